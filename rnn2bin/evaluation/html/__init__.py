"""report.json as a page, a model card and a terminal table: words, numbers and geometry here, one home a plot; shapes in templates/.

Nothing is measured here: every number comes from the report, and what the report leaves null is shown as a dash or left out.
"""

from rnn2bin.evaluation.html.axes import Axis
from rnn2bin.evaluation.html.card import render_card
from rnn2bin.evaluation.html.comparison import render_comparison, render_comparison_table
from rnn2bin.evaluation.html.figures import Figures, Heatmap, Histogram
from rnn2bin.evaluation.html.page import render
from rnn2bin.evaluation.html.provenance import title
from rnn2bin.evaluation.html.speed import timed
from rnn2bin.evaluation.html.terminal import render_table
from rnn2bin.evaluation.html.words import finite, sentence, significant

__all__ = [
    "Axis",
    "Figures",
    "Heatmap",
    "Histogram",
    "finite",
    "render",
    "render_card",
    "render_comparison",
    "render_comparison_table",
    "render_table",
    "sentence",
    "significant",
    "timed",
    "title",
]
