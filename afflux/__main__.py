"""``python -m afflux``: the same as the ``afflux`` command."""

from afflux.main import app

app(prog_name="afflux")
