"""The project's notebooks in JupyterLab: trusted, and unchanged by opening or saving them.

Git keeps a notebook without the versions of who ran it last. JupyterLab writes those of its kernel into what it opens, which then counts
as changed; so it is given them here, and they are left out again when the notebook is saved.
"""

from __future__ import annotations

from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelspec import get_kernel_dict
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

from workflow.pages.normalise import METADATA


def is_ours(path: str) -> bool:
    """Whether the path, below the project, is that of one of its notebooks."""
    return path.strip("/").startswith("notebooks/")


class Notebooks(AsyncLargeFileManager):
    """JupyterLab's own way to read and write files, but for the project's notebooks."""

    async def get(self, path, content=True, **options):
        model = await super().get(path, content, **options)
        if content and model["type"] == "notebook" and is_ours(path):
            metadata, name = model["content"]["metadata"], get_kernel_dict()["display_name"]
            told = {
                "kernelspec": METADATA["kernelspec"] | {"display_name": name},
                "language_info": IPythonKernel.language_info,
            }
            metadata |= {key: value for key, value in told.items() if metadata.get(key) == METADATA[key]}
        return model

    async def save(self, model, path=""):
        if model.get("type") == "notebook" and model.get("content") and is_ours(path):
            metadata = model["content"]["metadata"]
            if metadata.get("kernelspec", {}).get("name") == METADATA["kernelspec"]["name"]:
                metadata |= METADATA
        return await super().save(model, path)

    def mark_trusted_cells(self, nb, path=""):
        if is_ours(path):  # whoever starts this server runs the project's code already
            self.notary.mark_cells(nb, True)
        else:
            super().mark_trusted_cells(nb, path)
