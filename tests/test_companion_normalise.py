"""Notebooks in normal form: a rerun that changes no result changes no byte, and nothing said is lost."""

from __future__ import annotations

import base64
import io
import json

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from lib.system.errors import CompanionError
from lib.system.pictures import palette_png
from workflow.pages import normalise
from workflow.pages.normalise import normalised

WARNING = "[IPKernelApp] WARNING | Kernel is running over TCP without encryption. All communication is plain text.\n"


def _png(noise: int, size: int = 200) -> str:
    pixels = np.random.default_rng(noise).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _notebook(seed: int = 0, injected: int | None = 0, images: int = 1, size: int = 200) -> str:
    """What papermill leaves behind; everything that depends on ``seed`` is accident."""
    parameters = new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]})
    extra = [new_code_cell(f"# Parameters\nseed = {injected}\n", metadata={"tags": ["injected-parameters"]})]
    outputs = [
        new_output("stream", name="stderr", text=WARNING + "a warning that matters\n"),
        new_output("stream", name="stdout", text="ok  "),
        new_output("stream", name="stdout", text="DM\n"),
        new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": str(seed)}}),
        new_output("execute_result", {"text/plain": "1"}, execution_count=seed + 9),
    ]
    outputs += [
        new_output(
            "display_data", {"image/png": _png(k, size)}, metadata={"image/png": {"alt": "A", "w": seed}}
        )
        for k in range(images)
    ]
    code = new_code_cell("1  ", execution_count=seed + 9, outputs=outputs)
    code.metadata = {
        "papermill": {"duration": seed},
        "execution": {"iopub.status.busy": str(seed)},
        "tags": ["b", "a"],
    }
    node = new_notebook(
        cells=[new_markdown_cell("# T"), parameters, *(extra if injected is not None else []), code]
    )
    node.metadata = {"papermill": {"start_time": seed}, "widgets": {"state": seed}}
    node.metadata["language_info"] = {"name": "python", "version": f"3.11.{seed}"}
    for number, cell in enumerate(node.cells):
        cell.id = f"random-{seed}-{number}"
    return json.dumps(node)


def test_only_results_remain():
    text = normalised(_notebook())
    node = nbformat.reads(text, as_version=4)
    nbformat.validate(node)
    assert [cell.id for cell in node.cells] == ["cell-00", "cell-01", "cell-02"]
    assert [cell.metadata for cell in node.cells] == [{}, {"tags": ["parameters"]}, {"tags": ["a", "b"]}]
    assert node.cells[2].source == "1" and node.cells[2].execution_count == 1
    kinds = [(output.output_type, output.get("text")) for output in node.cells[2].outputs]
    assert kinds[:2] == [("stream", "a warning that matters\n"), ("stream", "ok  DM\n")]
    assert [kind for kind, _ in kinds[2:]] == ["execute_result", "display_data"]
    assert node.cells[2].outputs[-1].metadata == {"image/png": {"alt": "A"}}
    words = normalised(_notebook(images=0))
    assert not any(word in words for word in ("papermill", "widget", "TCP", "iopub", "3.11."))


def test_accidents_of_a_run_make_no_difference_and_normal_form_is_final():
    once = normalised(_notebook(seed=1))
    assert once == normalised(_notebook(seed=2))
    assert once == normalised(once) and once.endswith("}\n") and not once.endswith("\n\n")


def test_pictures_keep_their_look_without_metadata():
    ramp = np.tile(np.arange(0, 250, 2, dtype=np.uint8), (40, 1))
    source, buffer = Image.fromarray(ramp).convert("RGBA"), io.BytesIO()
    source.save(buffer, format="PNG", dpi=(99, 99))
    small = palette_png(buffer.getvalue())
    assert palette_png(small) == small
    with Image.open(io.BytesIO(small)) as image:
        assert image.mode == "P" and not image.info.get("dpi")
        assert np.abs(np.asarray(image.convert("L")).astype(int) - ramp).max() <= 2


def test_no_colour_of_a_rich_picture_is_given_up():
    pixels = np.random.default_rng(0).integers(0, 256, (120, 120, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    with Image.open(io.BytesIO(palette_png(buffer.getvalue()))) as image:
        error = np.abs(np.asarray(image.convert("RGB")).astype(int) - pixels)
    assert error.max() <= 60 and error.mean() < 20


def test_a_heavy_notebook_is_made_to_fit():
    heavy = _notebook(images=1, size=700)
    assert len(heavy) > normalise.BYTES
    text = normalised(heavy)
    assert len(text.encode()) <= normalise.BYTES and text == normalised(text)


def test_adopting_outputs_of_a_run(tmp_path):
    executed, notebook = tmp_path / "executed.ipynb", tmp_path / "20_dm.ipynb"
    stored = nbformat.reads(_notebook(injected=None, images=0), as_version=4)
    stored.cells[0].source = "# A better title"
    stored.cells[2].outputs = []
    notebook.write_text(nbformat.writes(stored))
    executed.write_text(_notebook(injected=0))
    node = nbformat.reads(normalise.adopt(executed, notebook), as_version=4)
    assert node.cells[0].source == "# A better title" and len(node.cells[2].outputs) == 4
    executed.write_text(_notebook(injected=1))
    with pytest.raises(CompanionError, match="(?s)other parameters.*seed = 1"):
        normalise.adopt(executed, notebook)
    executed.write_text(_notebook().replace('"1  "', '"2"'))
    with pytest.raises(CompanionError, match="other code"):
        normalise.adopt(executed, notebook)
    failed = nbformat.reads(_notebook(), as_version=4)
    failed.cells[-1].outputs.append(new_output("error", ename="ValueError", evalue="", traceback=[]))
    executed.write_text(nbformat.writes(failed))
    with pytest.raises(CompanionError, match="ended in an error"):
        normalise.adopt(executed, notebook)


def test_the_command_checks_and_repairs(tmp_path, capsys):
    path = tmp_path / "20_dm.ipynb"
    path.write_text(_notebook())
    assert (
        normalise.main([str(path), "--check"]) == 1
        and "20_dm.ipynb: not normalised" in capsys.readouterr().out
    )
    assert normalise.main([str(path)]) == 0
    capsys.readouterr()
    assert normalise.main([str(path), "--check"]) == 0 and capsys.readouterr().out == ""
    path.write_text("{}broken")
    assert normalise.main([str(path)]) == 1 and "not a notebook" in capsys.readouterr().err
