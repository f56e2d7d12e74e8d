"""Messages survive their way, and refuse what they should refuse."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from gesso_contracts import (
    AnnotateText,
    AskReady,
    BlobRef,
    ContractError,
    DecodeLatent,
    EmbedText,
    GenerateImage,
    ImageEncoded,
    Inline,
    Job,
    JobPreview,
    JobState,
    Message,
    Problem,
    Reconstructed,
    WordSpec,
    decode,
    encode,
    headers,
    limits,
    parse,
)
from gesso_contracts.asyncapi import all_messages
from hypothesis import given, settings
from hypothesis import strategies as st

SHA = "0" * 64
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

EXAMPLES: list[Message] = [
    GenerateImage(model="sana-tiny", prompt="a red 🚗", width=64, height=96, seed=2**63 - 1),
    DecodeLatent(
        model="dcae-tiny",
        latent=Inline(data=bytes(range(256)), media_type="application/safetensors", shape=(1, 2)),
    ),
    ImageEncoded(latent=BlobRef(key=SHA, size=0, sha256=SHA, media_type="image/png")),
    EmbedText(model="smollm2-l6", prompts=["a", "b"]),
    JobState(
        id="j",
        service="diffusion",
        kind="generate-image",
        status="failed",
        created_at=NOW,
        updated_at=NOW,
        request_sha256=SHA,
        problem=Problem(title="T", status=500, code="internal", detail="d"),
    ),
    JobPreview(job_id="j", step=1, image=b"\x00\xff"),
    AskReady(),
]


def generate(**changes: Any) -> str:
    fields = {"model": "sana-tiny", "prompt": "a cat", "width": 64, "height": 64, "seed": 1}
    return json.dumps({**fields, **changes})


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.schema_name())
def test_what_is_encoded_decodes_to_the_same_message(message: Message) -> None:
    data, header = encode(message)
    assert decode(data, header, type(message)) == message
    assert header == {"Schema": message.schema_name(), "Content-Type": "application/json"}


@given(data=st.binary(max_size=2000), media_type=st.sampled_from(["image/png", "text/plain"]))
@settings(max_examples=50, deadline=None)
def test_any_bytes_survive_inside_a_message(data: bytes, media_type: str) -> None:
    inline = Inline(data=data, media_type=media_type)
    assert decode(*encode(inline), Inline) == inline
    assert Inline.model_validate(inline.model_dump(mode="json")) == inline


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (None, "no Schema header; expected 'GenerateImage/1'"),
        ({"Schema": "GenerateImage/2"}, "schema 'GenerateImage/2'; expected 'GenerateImage/1'"),
        ({"Schema": "EmbedText/1"}, "schema 'EmbedText/1'; expected"),
        ({"Schema": "GenerateImage/1", "Content-Type": "text/xml"}, "content type 'text/xml'"),
    ],
)
def test_decoding_is_strict_on_name_version_and_type(
    header: dict[str, str] | None, complaint: str
) -> None:
    with pytest.raises(ContractError, match=complaint):
        decode(generate().encode(), header, GenerateImage)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "   "}, "prompt"),
        ({"prompt": "x" * 4001}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"negative_prompt": "x" * 4001}, "negative_prompt"),
        ({"width": 0}, "width"),
        ({"width": 100}, "width"),
        ({"width": 4128}, "width"),
        ({"height": "tall"}, "height"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"steps": 0}, "steps"),
        ({"steps": 101}, "steps"),
        ({"guidance_scale": -0.1}, "guidance_scale"),
        ({"guidance_scale": 31}, "guidance_scale"),
        ({"sampler": "ddim"}, "sampler"),
        ({"output_format": "bmp"}, "output_format"),
        ({"model": ""}, "model"),
        ({"model": "../../etc/passwd"}, "model"),
        ({"model": "a//b"}, "model"),
        ({"model": "a/../b"}, "model"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_given(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ContractError) as caught:
        parse(generate(**changes), GenerateImage)
    assert caught.value.field == field
    assert f"GenerateImage/1 field {field!r}: " in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b'"text"', b"null"])
def test_bytes_that_are_no_message_are_one_clear_error(data: bytes) -> None:
    with pytest.raises(ContractError, match="GenerateImage/1"):
        parse(data, GenerateImage)


def test_a_prompt_with_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ContractError):
        parse(generate(prompt="x").replace('"x"', '"\\ud800"'), GenerateImage)


def test_text_that_is_not_base64_is_refused() -> None:
    with pytest.raises(ContractError, match="not base64"):
        parse('{"data": "%%%", "media_type": "image/png"}', Inline)


def test_inline_bytes_have_a_limit() -> None:
    with pytest.raises(ValueError, match="at most 5242880 bytes"):
        Inline(data=bytes(limits.INLINE_RPC_BYTES + 1), media_type="image/png")


def test_the_largest_inline_bytes_fit_into_a_message_of_the_broker() -> None:
    largest = Inline(data=bytes(limits.INLINE_RPC_BYTES), media_type="image/png")
    data, _ = encode(DecodeLatent(model="m", latent=largest))
    assert len(data) < limits.BROKER_MAX_PAYLOAD


def test_infinite_quality_cannot_be_said() -> None:
    blob = BlobRef(key=SHA, size=1, sha256=SHA, media_type="image/png")
    with pytest.raises(ValueError, match="psnr_db"):
        Reconstructed(image=blob, width=1, height=1, psnr_db=float("inf"), ssim=1.0)


def test_messages_cannot_be_changed() -> None:
    message = parse(generate(), GenerateImage)
    with pytest.raises(ValueError, match="frozen"):
        message.seed = 2  # type: ignore[misc]


def test_a_time_without_a_zone_is_refused() -> None:
    fields = {"id": "j", "service": "s", "kind": "k", "request_schema": "AskReady/1"}
    with pytest.raises(ContractError, match="submitted_at"):
        parse(json.dumps({**fields, "request": {}, "submitted_at": "2026-01-01T00:00:00"}), Job)


# Messages that have changed since their first version.
VERSIONS = {"ServiceReady": 2}


def test_every_message_says_what_it_is_for() -> None:
    for model in all_messages():
        assert model.__doc__, model.__name__
        version = VERSIONS.get(model.__name__, 1)
        assert model.schema_name() == f"{model.__name__}/{version}"


def test_header_names_are_those_of_the_protocols() -> None:
    assert headers.MESSAGE_ID == "Nats-Msg-Id"
    assert headers.ERROR_CODE == "Nats-Service-Error-Code"
    assert headers.TRACEPARENT == "traceparent"


def test_the_most_words_that_may_be_sent_fit_a_message_beside_a_picture() -> None:
    far = -123456.78901234567
    word = WordSpec(text="😀" * 8, polygon=[(far, far)] * 5, script="€€", ignore=True)
    image = Inline(data=bytes(limits.INLINE_JOB_BYTES // 2), media_type="image/png")
    words = [word] * limits.MAX_WORDS
    data, _ = encode(AnnotateText(model="char-sam", image=image, words=words))
    assert len(data) < limits.JOB_MESSAGE_BYTES - 10_000
    longer = [WordSpec(text="😀" * 9, polygon=word.polygon, script="€€"), *words[1:]]
    with pytest.raises(ValueError, match="20,001 characters in all, at most 20,000"):
        AnnotateText(model="char-sam", image=image, words=longer)
