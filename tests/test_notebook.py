"""docs/mamba3.ipynb runs from top to bottom, and is kept without what it prints and draws.

Its own assertions say that the loop, the chunks and the single steps are equal.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "mamba3.ipynb"
SECONDS = 240  # that one cell may take on a machine that is shared; all of them take ten
LACKING = [
    name
    for name in ("nbclient", "nbformat", "ipykernel", "matplotlib")
    if importlib.util.find_spec(name) is None
]


def cells(kind: str) -> list[dict]:
    """The notebook's cells of a kind, as its file has them."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_kept_without_outputs():
    for cell in cells("code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


# In CI nothing may be lacking: there, an import that fails is a failure.
@pytest.mark.skipif(
    bool(LACKING) and os.environ.get("CI") != "true",
    reason=f"pip install -r requirements-dev.txt: {', '.join(LACKING)} not there",
)
def test_the_notebook_runs_and_draws(monkeypatch, tmp_path):
    import nbclient
    import nbformat

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # nobody's own start-up files
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}  # where Jupyter starts it
    nbclient.NotebookClient(notebook, timeout=SECONDS, resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    drawing = [cell for cell in cells("code") if "plt.show()" in "".join(cell["source"])]
    assert len(pictures) == len(drawing) == 5
