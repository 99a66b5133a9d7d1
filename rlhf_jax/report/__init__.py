"""report.html: a run, or several, as one file that needs nothing else. No script, no font, no picture from anywhere.

data      run directories -> numbers; `text` makes what models and users wrote inert, and is the only way into the page
plots     numbers -> inline SVG
curves    gold against proxy, learning curves
sections  everything else that is on the page
page      `write_report`
"""

from rlhf_jax.report.page import check_run_dirs, write_report

__all__ = ["check_run_dirs", "write_report"]
