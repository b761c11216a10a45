"""Why a model answered as it did, and whether the explanation holds up."""
