"""From the quadratic model of an update to candidate steps: solvers, and what they are made of."""
