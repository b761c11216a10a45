"""A loaded model made quick: it gives the same answers, as far as the precision goes, in less time.

`optimize` replaces a model's stacks of blocks, its output matrix and what makes tokens of pixels by modules
of an engine: `native` is C++ that is compiled on first use, `packed` torch's own operators.
"""

from qkv.fast.roads import Road, optimize

__all__ = ["Road", "optimize"]
