"""``gesso ask`` and ``gesso judge``: what a model sees in pictures, from the command line."""

from pathlib import Path
from typing import Annotated, Any

import typer
from gesso_core.errors import InvalidRequest

from gesso_services.cli.common import Key, Local, Url, err, one_sentence, out, remark, server
from gesso_services.client import DEFAULT_URL, Answer

Model = Annotated[str | None, typer.Option(help="A model that sees; see `gesso models list`.")]


@one_sentence
def ask(
    *,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[FILE]... QUESTION", help="Pictures or videos, and the question in quotes."
        ),
    ],
    model: Model = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="When to stop talking.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="0 takes the likeliest words.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="With a temperature.")] = None,
    local: Local = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Ask a question about pictures or a video, or about nothing that can be seen."""
    *files, question = _files_and_text(words, "the question")
    shown = [Path(name).read_bytes() for name in files]
    options: dict[str, Any] = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    if local:
        from gesso_services.cli.local_seeing import ask_here

        answer = ask_here(question, shown, options, _say)
    else:
        with server(url, key) as gesso:
            answer = gesso.ask(question, *shown, on_text=_say, **options)
    _end(answer)


@one_sentence
def judge(
    *,
    words: Annotated[
        list[str],
        typer.Argument(metavar="FILE... PROMPT", help="Pictures, and the prompt in quotes."),
    ],
    model: Model = None,
    local: Local = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Say for each picture how probable it is that it shows the prompt."""
    *files, prompt = _files_and_text(words, "the prompt")
    if not files:
        raise InvalidRequest(f"there is no picture before {prompt!r}; name one file or more")
    pictures = [Path(name).read_bytes() for name in files]
    with err.status(f"looking at {len(files)} pictures"):
        if local:
            from gesso_services.cli.local_seeing import judge_here

            scores = judge_here(prompt, pictures, model)
        else:
            with server(url, key) as gesso:
                scores = gesso.judge(prompt, *pictures, model=model)
    for name, score in zip(files, scores, strict=True):
        out.print(f"{name}  {score:.4f}", highlight=False, markup=False, soft_wrap=True)


def _files_and_text(words: list[str], what: str) -> list[str]:
    """The words, after a look whether the last one may have been forgotten."""
    if Path(words[-1]).is_file():
        raise InvalidRequest(f"{words[-1]} is a file; put {what} in quotes behind the files")
    return words


def _say(new: str) -> None:
    out.print(new, end="", markup=False, highlight=False, soft_wrap=True)


def _end(answer: Answer) -> None:
    out.print()
    if answer.finish_reason == "length":
        remark(
            f"the answer was cut after {answer.answer_tokens} tokens; ask for more with "
            "--max-tokens"
        )
