"""What is drawn: each line of the tables is a feature; `<name>` in it is drawn from `SLOTS`. The first of a table is the simplest.

A feature of a network is an expression of the tensor `h`, then the layers `@0`, `@1` that it calls; a layer alone stands for its call on `h`.
"""

SLOTS = {
    "units": ["1", "2", "3"],
    "activation": ["None", "'tanh'", "'sigmoid'", "'softplus'", "'gelu'", "'relu'", "'swish'", "'elu'"],
    "kernel": ["1", "2", "3"],
    "size": ["1", "2"],
    "padding": ["'same'", "'valid'"],
    "flag": ["False", "True"],
    "recurrent": ["LSTM", "GRU", "SimpleRNN"],
    "merge": ["'concat'", "'sum'"],
    "power": ["0.5", "2.0"],
}
EVERYWHERE = [
    "L.Dense(<units>, <activation>)",
    "L.Dense(<units>, <activation>, use_bias=False)",
    "L.LayerNormalization()",
    "L.BatchNormalization()",
    "L.BatchNormalization(scale=False)",
    "L.RMSNormalization()",
    "L.UnitNormalization()",
    "L.GroupNormalization(1)",
    "L.Activation(<activation>)",
    "L.PReLU()",
    "L.Rescaling(<power>)",
    "L.Softmax()",
    "L.Flatten()",
    "L.Lambda(lambda h: tf.concat([h, tf.sin(h)], -1))",
    "L.Lambda(lambda h: tf.cumsum(h, -1))",
    "L.Lambda(lambda h: tf.reverse(h, [-1]))",
    "L.Lambda(lambda h: tf.where(h > 0.1, h, 0.3 * h * h))",
    "L.Lambda(lambda h: tf.stack([h[..., 0], 2 * h[..., -1]], -1))",
    "L.Lambda(lambda h: tf.pad(h, [[0, 0]] * (h.shape.rank - 1) + [[1, 0]]))",
    "L.Lambda(lambda h: tf.sort(h, -1))",
    "@1([h, @0(h)]) | L.Dense(<width>, <activation>) | L.Add()",
    "@1([h, @0(h)]) | L.Dense(<units>, <activation>) | L.Concatenate()",
    "@1([h, @0(h)]) | L.Dense(<width>, <activation>) | L.Multiply()",
    "@0(@0(h)) | L.Dense(<width>, 'tanh')",
    "@0(h) + @0(keras.ops.flip(h, -1)) | L.Dense(<units>, <activation>)",
    "keras.ops.tanh(@0(h)) * @1(h) | L.Dense(2) | L.Dense(2, 'sigmoid')",
    "keras.ops.concatenate([@0(h), keras.ops.max(h, -1, keepdims=True)], -1) | L.Dense(<units>)",
    "keras.ops.logsumexp(h, -1, keepdims=True) | ",
    "L.Dense(<units>, <activation>, kernel_regularizer=keras.regularizers.L2(0.1))",
    "L.Dense(<units>, <activation>, bias_regularizer=keras.regularizers.L1L2(0.1, 0.1))",
    "L.Dense(<units>, <activation>, activity_regularizer=keras.regularizers.L2(0.1))",
    "L.Dense(<units>, <activation>, trainable=False)",
    "L.BatchNormalization(trainable=False)",
    "L.Dense(<units>, <activation>, kernel_constraint=keras.constraints.NonNeg())",
    "L.Dense(<units>, kernel_constraint=keras_hf.Box(-0.5, 0.5), bias_constraint=keras_hf.Box(0.0, 1.0))",
    "L.Dense(<units>, <activation>, kernel_constraint=keras.constraints.MaxNorm(0.7))",
    "L.Dense(<units>, <activation>, kernel_constraint=keras.constraints.UnitNorm())",
    "Added()",
    "Moving()",
]
BY_RANK = {
    2: [
        "L.Reshape((-1, 1))",
        "L.RepeatVector(<size>)",
        "L.EinsumDense('ab,bc->ac', <units>, bias_axes='c')",
    ],
    3: [
        "L.Conv1D(<units>, <kernel>, padding=<padding>)",
        "L.Conv1D(<units>, <kernel>, padding='causal', dilation_rate=<size>, activation=<activation>)",
        "L.Conv1D(<units>, <kernel>, strides=<size>, padding=<padding>)",
        "L.Conv1D(2, <kernel>, groups=2, padding='same')",
        "L.Conv1DTranspose(<units>, <kernel>, strides=<size>, padding=<padding>)",
        "L.DepthwiseConv1D(<kernel>, padding=<padding>, depth_multiplier=<size>)",
        "L.SeparableConv1D(<units>, <kernel>, padding=<padding>)",
        "L.MaxPooling1D(<size>)",
        "L.AveragePooling1D(<size>, padding=<padding>)",
        "L.GlobalMaxPooling1D()",
        "L.GlobalAveragePooling1D()",
        "L.UpSampling1D(<size>)",
        "L.ZeroPadding1D(1)",
        "L.Cropping1D((1, 0))",
        "L.Permute((2, 1))",
        "L.Masking()",
        "L.<recurrent>(<units>)",
        "L.<recurrent>(<units>, return_sequences=True)",
        "L.<recurrent>(<units>, return_sequences=<flag>, stateful=True)",
        "L.<recurrent>(<units>, return_sequences=<flag>, go_backwards=True)",
        "L.<recurrent>(<units>, return_sequences=<flag>, unroll=True)",
        "L.<recurrent>(<units>, return_sequences=True, activation='softplus', use_bias=<flag>)",
        "L.RNN([L.GRUCell(<units>), L.LSTMCell(<units>)], return_sequences=<flag>)",
        "L.Bidirectional(L.<recurrent>(<units>, return_sequences=<flag>), merge_mode=<merge>)",
        "L.TimeDistributed(L.Dense(<units>, <activation>))",
        "L.TimeDistributed(L.LayerNormalization())",
        "@0(h, h) | L.MultiHeadAttention(<size>, <size>)",
        "@0(h, h, use_causal_mask=True) | L.MultiHeadAttention(<size>, <size>)",
        "@0(h, h) | L.GroupQueryAttention(2, 2, <size>)",
        "@0([h, h]) | L.Attention(use_scale=<flag>)",
        "@0([h, h]) | L.AdditiveAttention()",
        "L.EinsumDense('abc,cd->abd', (None, <units>), bias_axes='d')",
        "@0([h, h]) | L.Dot(-1)",
    ],
    4: [
        "L.Conv2D(<units>, <kernel>, padding=<padding>, activation=<activation>)",
        "L.Conv2D(<units>, <kernel>, padding=<padding>, strides=<size>)",
        "L.Conv2D(2, <kernel>, groups=2, padding='same')",
        "L.Conv2DTranspose(<units>, <kernel>, strides=<size>, padding=<padding>)",
        "L.DepthwiseConv2D(<kernel>, padding=<padding>)",
        "L.SeparableConv2D(<units>, <kernel>, padding=<padding>)",
        "L.MaxPooling2D(<size>)",
        "L.AveragePooling2D(<size>, padding=<padding>)",
        "L.GlobalMaxPooling2D()",
        "L.GlobalAveragePooling2D()",
        "L.ZeroPadding2D(1)",
        "L.Cropping2D(((1, 0), (0, 0)))",
        "L.Permute((2, 1, 3))",
        "L.Reshape((-1, <width>))",
        "L.TimeDistributed(L.Conv1D(<units>, 1))",
        "L.TimeDistributed(L.<recurrent>(<units>))",
        "L.ConvLSTM1D(<units>, 1, return_sequences=<flag>)",
    ],
}
# What makes one case, and its inputs.
INPUTS = {
    "vectors": "rng.normal(size=(N, K))",
    "sequences": "rng.normal(size=(N, T, K))",
    "images": "rng.normal(size=(N, T, K + 1, K))",
    "tokens": "rng.integers(0, 4, size=(N, T))",
    "padded sequences": "rng.normal(size=(N, T, K)) * (np.arange(T)[:, None] <= rng.integers(0, T, size=(N, 1, 1)))",
}
REALS, POSITIVE, BITS = (
    "rng.normal(size={shape})",
    "rng.uniform(0.2, 2.0, size={shape})",
    "rng.integers(0, 2, size={shape})",
)
ONE_HOT = "np.eye({width})[rng.integers(0, {width}, size={shape}[:-1])]"
LABELS = "rng.integers(0, {width}, size={shape}[:-1])"
SIMPLEX = "rng.dirichlet(np.ones({width}), size={shape}[:-1])"
# Loss -> activation of the last layer, targets, where the loss is cut, how many units it needs.
LOSSES = {
    "'mse'": ("linear", REALS, "value", 1),
    "keras.losses.MeanSquaredError()": ("tanh", REALS, "value", 1),
    "keras.losses.MeanSquaredError(reduction='sum')": ("linear", REALS, "value", 1),
    "keras.losses.MeanSquaredError(reduction='mean_with_sample_weight')": ("linear", REALS, "value", 1),
    "keras.losses.MeanAbsoluteError()": ("linear", REALS, "value", 1),
    "keras.losses.Huber(0.5)": ("linear", REALS, "value", 1),
    "keras.losses.LogCosh()": ("linear", REALS, "value", 1),
    "keras.losses.MeanSquaredLogarithmicError()": ("softplus", POSITIVE, "value", 1),
    "keras.losses.Poisson()": ("softplus", POSITIVE, "value", 1),
    "keras.losses.SquaredHinge()": ("linear", BITS, "value", 1),
    "keras.losses.CosineSimilarity()": ("linear", REALS, "value", 2),
    "keras.losses.KLDivergence()": ("softmax", SIMPLEX, "value", 2),
    "keras.losses.BinaryCrossentropy()": ("sigmoid", BITS, "argument", 1),
    "keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.1)": ("linear", BITS, "value", 1),
    "keras.losses.BinaryFocalCrossentropy(from_logits=True)": ("linear", BITS, "value", 1),
    "keras.losses.CategoricalCrossentropy()": ("softmax", ONE_HOT, "argument", 2),
    "keras.losses.CategoricalCrossentropy(from_logits=True)": ("linear", ONE_HOT, "value", 2),
    "keras.losses.SparseCategoricalCrossentropy()": ("softmax", LABELS, "argument", 2),
    "keras.losses.SparseCategoricalCrossentropy(from_logits=True)": ("linear", LABELS, "value", 2),
    "keras.losses.Dice()": ("sigmoid", BITS, "value", 1),
    "keras_hf.Cauchy(0.5)": ("linear", REALS, "value", 1),
    "lambda y, p: tf.reduce_sum((tf.cast(y, p.dtype) - p) ** 4, -1)": ("linear", REALS, "value", 1),
    "lambda y, p: tf.reduce_mean(tf.cosh(tf.cast(y, p.dtype) - p)) ** 2": ("linear", REALS, "value", 1),
}
SQUARES = ("'mse'", "keras.losses.MeanSquaredError")
# Losses of a batch that are not what its cases doubled have; networks of which a case's outputs depend on other cases.
NOT_MEANS = "reduction='sum'", "Dice", "cosh"
OF_ALL_CASES = "BatchNormalization", "Moving"
WEIGHTS = ["None", "rng.uniform(0.5, 2.0, size=N)", "rng.integers(0, 2, size=N).astype(float)"]
FORMS = ["functional", "sequential", "subclassed"]
OUTPUTS = ["one output", "a list of outputs", "a dict of outputs"]
SOLVERS = [
    "keras_hf.DirectSolver()",
    "keras_hf.DirectSolver(order=1)",
    "keras_hf.ConjugateGradient()",
    "keras_hf.ConjugateGradient(preconditioner=keras_hf.Identity())",
    "keras_hf.ConjugateGradient(preconditioner=keras_hf.EmpiricalFisherDiagonal())",
    "keras_hf.ConjugateGradient(preconditioner=keras_hf.KroneckerFactored())",
    "keras_hf.ConjugateGradient(preconditioner=keras_hf.Nystrom(2))",
    "keras_hf.PreconditionedMomentum()",
    "keras_hf.PreconditionedMomentum(preconditioner=keras_hf.EmpiricalFisherDiagonal())",
]
# Up to three of these are not left out.
SETTINGS = {
    "micro_batch_size": ["100", "1", "2"],
    "weight_decay": ["0.1", "0.0"],
    "curvature": [
        "keras_hf.GaussNewton(keras_hf.DoubleBackward())",
        "keras_hf.GaussNewton(keras_hf.ForwardAccumulation())",
        "keras_hf.Hessian()",
        "keras_hf.FiniteDifferenceHessian()",
        "keras_hf.EmpiricalFisher()",
    ],
    "curvature_batch_size": ["2"],
    "growing_batch": ["keras_hf.GrowingBatch(initial_size=2)", "None"],
    "structural_damping": ["keras_hf.StructuralDamping(0.5)"],
    "use_ema": ["True"],
    "batch_size": ["100", "2"],
    "shuffle": ["False"],
    "class_weight": ["{0: 0.5, 1: 2.0}"],
    "steps_per_execution": ["2"],
    "floatx": ["float32"],
    "scope": ["tf.distribute.MirroredStrategy(['CPU:0', 'CPU:1']).scope"],
    "batch_shape": ["x.shape"],
}
OF_FIT, OF_COMPILE = ("batch_size", "shuffle", "class_weight"), ("steps_per_execution",)
OF_PROGRAM = ("floatx", "scope", "batch_shape")
# Updates then see other cases than those of the whole batch, or end elsewhere.
OF_PARTS = ("curvature_batch_size=2", "growing_batch=keras_hf", "use_ema", "batch_size=2")
# In the middle of a run: what changes nothing, and what the next update must see.
PAUSES = ["nothing", "save_weights", "save", "pickle"]
CHANGES = ["nothing", "weights", "targets", "more cases", "frozen", "damping", "weight_decay"]
# Networks of more weights or positions take longer than they show.
MOST_WEIGHTS, MOST_ENTRIES = 120, 30
