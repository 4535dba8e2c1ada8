"""What the site of mkdocs.yml needs beyond its settings: files of other folders, notebooks of guides, and the examples of docstrings."""

import collections
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import griffe
import jupytext
import nbclient
from markdown_it import MarkdownIt
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# Guides that the site offers as notebooks, too.
NOTEBOOKS = ("getting-started.md", "recurrent.md", "physics-informed.md")
# Set by `make docs`: notebooks are run, side by side, and show what their cells print.
_EXECUTE = "KERAS_HF_EXECUTE_NOTEBOOKS"
# A link of a page of docs/ to a file of another folder, as it works on GitHub.
_OUTSIDE = re.compile(r"\]\(\.\./((?:benchmarks|examples|keras_hf|tests)/[^()\s#]+\.\w+)\)")
_TAGS = re.compile(r"<(blockquote|img|li|ol|pre|table|tr|ul)\b")

log = get_plugin_logger("hooks")


def on_files(files, config):
    """Adds notebooks, and the files of other folders that pages link to, under the same paths."""
    pages = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for path in sorted({path for text in pages.values() for path in _OUTSIDE.findall(text)}):
        if (ROOT / path).exists():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    notebooks = [notebook(pages[name]) for name in NOTEBOOKS]
    if os.environ.get(_EXECUTE):
        with ThreadPoolExecutor(2) as pool:
            notebooks = list(pool.map(executed, notebooks))
    for name, made in zip(NOTEBOOKS, notebooks, strict=True):
        files.append(File.generated(config, _ipynb(name), content=jupytext.writes(made, "ipynb")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points links to these files at their copies, and links notebooks."""
    name = page.file.src_uri
    if name in NOTEBOOKS:
        markdown = re.sub(r"^(# .*\n)", rf"\1\n[This page as a notebook]({_ipynb(name)})\n", markdown, count=1)
    return _OUTSIDE.sub(r"](\1)", markdown)


def on_page_content(html, page, config, files):
    """Warns where the site would show lists, tables or code otherwise than GitHub does, as Python-Markdown is stricter about indentation."""
    if not page.file.src_uri.startswith("api/"):
        shown, meant = (
            collections.Counter(_TAGS.findall(text))
            for text in (html, MarkdownIt().enable("table").render(page.markdown))
        )
        if shown != meant:
            log.warning(
                f"{page.file.src_uri} is not what GitHub shows: {dict(shown - meant)} too many, {dict(meant - shown)} too few. Indent what belongs "
                "to an item of a list by four spaces, with an empty line before and after it, and begin no wrapped line as an item begins."
            )


def notebook(text):
    """Returns the notebook of a page: a code cell for each block of Python, and Markdown cells, whose links within the site are left out."""
    made = jupytext.reads(text.replace("```bash", "```text"), "md")
    for cell in made.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\[([^\]]+)\]\((?!\w+://)[^)]*\)", r"\1", cell.source)
    made.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return made


def executed(made):
    """Returns a notebook with what its cells print and draw; an error in a cell ends the build."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        client = nbclient.NotebookClient(made, timeout=None, resources={"metadata": {"path": folder}})
        client.execute(env=environment)
    for cell in made.cells:
        # TensorFlow's messages when it starts.
        cell["outputs"] = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
        if cell.cell_type != "code":
            del cell["outputs"]
    return made


def _ipynb(name):
    return str(Path(name).with_suffix(".ipynb"))


class Prompts(griffe.Extension):
    """Makes Google's section `Examples` of what the docstrings write as Keras does: `Example:`, and prompts without indentation."""

    def on_object(self, *, obj, **kwargs):
        """Called by griffe for each object of the package."""
        if obj.docstring:
            obj.docstring.value = with_examples(obj.docstring.value)


def with_examples(docstring):
    """Returns the docstring with its prompts, up to the next empty line, in a section of their own."""
    return re.sub(
        r"^Example:\n\n((?:.+(?:\n|\Z))+)",
        lambda match: "Examples:\n" + re.sub(r"^", "    ", match[1].rstrip("\n"), flags=re.MULTILINE) + "\n",
        docstring,
        flags=re.MULTILINE,
    )
