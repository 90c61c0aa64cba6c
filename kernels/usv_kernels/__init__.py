"""Kernels of learned sparse attention: operations on tensors, each with a reference, a fast CPU path and Triton.

Importing this package needs torch only; Triton is imported when a Triton kernel first runs.
"""

from ._products import multiplies_bf16 as multiplies_bf16
from .block_pool import block_pool as block_pool
from .block_sparse_attention import BlockProxy as BlockProxy
from .block_sparse_attention import block_proxy as block_proxy
from .block_sparse_attention import block_sparse_attention as block_sparse_attention
from .kmeans import Clusters as Clusters
from .kmeans import kmeans as kmeans
from .norm_rope import norm_rope as norm_rope
from .permute import inverse_permutation as inverse_permutation
from .permute import permute as permute
from .select import select_top_k as select_top_k
from .select import select_top_p as select_top_p
from .selection import BlockSelection as BlockSelection
