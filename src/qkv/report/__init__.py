"""One offline HTML file about trained models: curves, scores, samples and pictures.

Pages have no script and load nothing: pictures are inline SVG or data URIs. What `page`, `plot` and
`pictures` hold are pure functions from values to HTML text, and all text given to them is escaped.
"""

from qkv.report.page import (
    Card,
    Figure,
    Measure,
    Scores,
    Section,
    continuation,
    document,
    filled,
    page,
    score_table,
    shares,
    style,
    table,
)
from qkv.report.pictures import Matrix, gallery, heatmap, overlay, png
from qkv.report.plot import Line, curve, plot

__all__ = [
    "Card",
    "Figure",
    "Line",
    "Matrix",
    "Measure",
    "Scores",
    "Section",
    "continuation",
    "curve",
    "document",
    "filled",
    "gallery",
    "heatmap",
    "overlay",
    "page",
    "plot",
    "png",
    "score_table",
    "shares",
    "style",
    "table",
]
