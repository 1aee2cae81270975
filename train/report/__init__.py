"""report.html: what evaluation.json says, as one page with figures that also stand beside it as PNG files."""

from .page import write_report as write_report
from .pictures import draw_wall as draw_wall
