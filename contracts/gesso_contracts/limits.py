"""Every limit of what travels; the message types carry them into the generated documents."""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

# Bytes. The broker refuses anything larger than its own `max_payload`; inline bytes travel as
# base64 (4/3 of their size), so the RPC limit leaves room for that and for the other fields.
BROKER_MAX_PAYLOAD: Final = 8 * MIB
INLINE_RPC_BYTES: Final = 5 * MIB
INLINE_JOB_BYTES: Final = 1 * MIB
JOB_MESSAGE_BYTES: Final = 3 * MIB // 2
PREVIEW_BYTES: Final = 256 * KIB
BLOB_BYTES: Final = 512 * MIB
BLOB_CHUNK_BYTES: Final = 1 * MIB

# Text.
PROMPT_CHARS: Final = 4000
MODEL_NAME_CHARS: Final = 128
TOKEN_CHARS: Final = 64
DETAIL_CHARS: Final = 4000
PROMPTS_PER_CALL: Final = 64

# Pictures, pixels.
MIN_SIDE: Final = 32
MAX_SIDE: Final = 4096
# Any size is drawn at the nearest aspect-ratio bin, then scaled and cut; 8 keeps requests sane.
SIDE_MULTIPLE: Final = 8

# Denoising.
MAX_STEPS: Final = 100
MAX_GUIDANCE: Final = 30.0
SEED_LIMIT: Final = 2**63
MAX_LORAS: Final = 4
MAX_LORA_STRENGTH: Final = 4.0

# Tokens: answers, videos, judgements.
MAX_TOP_K: Final = 65536
MAX_KEEP: Final = 256
MAX_TURNS: Final = 64
MAX_PARTS: Final = 32
MAX_SHOWN: Final = 16  # pictures and videos of a conversation, all of them in memory at once
MAX_ANSWER_TOKENS: Final = 4096
MAX_STOPS: Final = 4
STOP_CHARS: Final = 100
MAX_TEMPERATURE: Final = 2.0
ANSWER_CHARS: Final = 100_000
PICTURES_PER_JUDGEMENT: Final = 16
MAX_FRAMES_PER_S: Final = 60

# Annotation.
MAX_COORDINATE: Final = 1e6
MAX_PROMPTS: Final = 64
MAX_POINTS: Final = 64
MAX_WORDS: Final = 2000
MAX_POLYGON: Final = 64
MAX_CORNERS: Final = 10_000  # of the polygons of a picture
MAX_CHARACTERS: Final = 20_000  # of its words
WORD_CHARS: Final = 400
FILE_NAME_CHARS: Final = 255
MAX_CARS: Final = 64
CALIBRATION_CHARS: Final = 10_000
SHAPE_CODE: Final = 64  # numbers that describe a shape
KITTI_CHARS: Final = 20_000
MAX_SIGNS: Final = 16  # pictures of one job that draws and labels
MAX_SIGN_WORDS: Final = 8
SIGN_WORD_CHARS: Final = 80
MIN_SIGN_SIDE: Final = 256
MAX_SIGN_SIDE: Final = 2048

# Jobs.
MAX_LIST: Final = 200
