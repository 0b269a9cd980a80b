"""The functions, each in the folder of its op under `caps_kernels/ops/`."""

from caps_kernels.ops.dense_capsules import dense_capsules as dense_capsules
from caps_kernels.ops.dynamic_routing import dynamic_routing as dynamic_routing
from caps_kernels.ops.predict_votes import predict_votes as predict_votes
from caps_kernels.ops.squash import squash as squash
