"""One offline HTML file about trained models: curves, scores, samples and pictures.

Pages have no script and load nothing: pictures are inline SVG or data URIs. What `page`, `plot` and
`pictures` hold are pure functions from values to HTML text, and all text given to them is escaped.
"""
