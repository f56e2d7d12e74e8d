"""Subjects are built in one place and never from unchecked text."""

import pytest
from gesso_contracts import subjects
from hypothesis import given
from hypothesis import strategies as st


def test_subjects_have_their_documented_form() -> None:
    assert subjects.rpc("autoencoder", "decode") == "gesso.v1.rpc.autoencoder.decode"
    assert subjects.job("diffusion", "generate-image") == "gesso.v1.job.diffusion.generate-image"
    assert subjects.all_jobs("diffusion") == "gesso.v1.job.diffusion.>"
    assert subjects.event("j1", "preview") == "gesso.v1.evt.job.j1.preview"
    assert subjects.all_events("j1") == "gesso.v1.evt.job.j1.*"
    assert subjects.cancel("diffusion") == "gesso.v1.ctl.diffusion.cancel"
    assert subjects.dead_letter("diffusion") == "gesso.v1.dlq.diffusion"
    assert subjects.blob_chunk("ab", 3) == "gesso.v1.blob.ab.3"
    assert subjects.blob("ab") == "gesso.v1.blob.ab.*"


@pytest.mark.parametrize(
    "value", ["", "A", "a.b", "a b", "*", ">", "../a", "a/b", "-a", "é", "a\n", "x" * 65, "a\x00"]
)
def test_what_cannot_be_one_token_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="cannot stand in a subject"):
        subjects.token(value)


@given(st.text(max_size=80))
def test_a_token_never_changes_the_shape_of_a_subject(value: str) -> None:
    try:
        built = subjects.event(value, "state")
    except ValueError:
        return
    assert built.count(".") == 5
    assert not set(built) & set(" *>\t\r\n")


def test_a_negative_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        subjects.blob_chunk("ab", -1)
