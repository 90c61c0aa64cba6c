"""Kernels of learned sparse attention: operations on tensors, each with a reference, a fast CPU path and Triton.

Importing this package needs torch only; Triton is imported when a Triton kernel first runs.
"""

from .block_sparse_attention import block_sparse_attention as block_sparse_attention
from .selection import BlockSelection as BlockSelection
from .block_pool import block_pool as block_pool
from .select import select_top_k as select_top_k
from .select import select_top_p as select_top_p
