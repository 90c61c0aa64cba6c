"""Row permutation in plain torch: `torch.gather`. Autograd's own gradient; the oracle of `permute`."""

import torch
from torch import Tensor


def permute(x_BHSD: Tensor, index_BHS: Tensor) -> Tensor:
    return torch.gather(x_BHSD, 2, index_BHS.long()[..., None].expand(x_BHSD.shape))
