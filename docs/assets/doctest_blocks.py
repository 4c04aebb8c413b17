"""An extension of griffe, which reads the doc-strings for the API reference: `>>>` examples become blocks of code.

Doc-strings are in Google's style, in which only a section named "Examples" is shown as code. Ours stand at the end without a heading, as
doctest runs them.
"""

from __future__ import annotations

import re

import griffe

_EXAMPLE = re.compile(r"(?:^>>> .*\n(?:^(?!\n).+\n)*)(?:\n?^>>> .*\n(?:^(?!\n).+\n)*)*", re.MULTILINE)


def with_code_blocks(text: str) -> str:
    """Put each run of `>>>` lines, with the output below it, between fences.

    >>> print(with_code_blocks("Add.\\n\\n>>> 1 + 1\\n2\\n"))
    Add.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    <BLANKLINE>
    """
    return _EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)


class DoctestBlocks(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring and ">>> " in obj.docstring.value:
            lines = [line for line in obj.docstring.value.split("\n")]
            text = "\n".join(line.replace("  # doctest: +SKIP", "") for line in lines)
            obj.docstring.value = with_code_blocks(text + "\n")
