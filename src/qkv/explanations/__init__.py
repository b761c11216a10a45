"""Why a model answered as it did, and whether the explanation holds up."""

from qkv.explanations.page import compare_page, page
from qkv.explanations.plain import from_json, to_json
from qkv.explanations.save import save

__all__ = ["compare_page", "from_json", "page", "save", "to_json"]
