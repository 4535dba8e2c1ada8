"""What every exchangeable part promises Keras: immutable settings that serialise."""


class Part:
    """Base of the parts handed to `HessianFree`. Subclasses with settings override `get_config`."""

    def get_config(self):
        """Returns the constructor's arguments as a dict."""
        return {}

    @classmethod
    def from_config(cls, config):
        """Makes the part from what `get_config` returned."""
        return cls(**config)
