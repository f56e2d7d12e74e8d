"""Settings of the HTTP edge, read from the environment once."""

from pathlib import Path

from gesso_contracts.limits import KIB, MIB
from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class GatewaySettings(BaseSettings):
    """``GESSO_GATEWAY_*`` and ``GESSO_API_KEYS``; times in seconds, sizes in bytes or pixels."""

    model_config = SettingsConfigDict(
        env_prefix="GESSO_GATEWAY_", frozen=True, populate_by_name=True, extra="ignore"
    )

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535, description="0 takes a free one")
    api_keys: SecretStr = Field(
        default=SecretStr(""), validation_alias=AliasChoices("GESSO_API_KEYS", "api_keys")
    )
    default_model: str = "sana-tiny"
    default_seeing_model: str = "vilau-tiny"
    default_autoencoder: str = "dcae-tiny"
    required_services: tuple[str, ...] = ("autoencoder", "diffusion", "autoregressive")

    deadline_s: float = Field(
        default=300.0, gt=0, description="how long a waiting request may take"
    )
    heartbeat_s: float = Field(
        default=10.0, gt=0, description="silence after which a stream says it lives"
    )
    ready_timeout_s: float = Field(default=2.0, gt=0)
    models_ttl_s: float = Field(default=5.0, ge=0)
    depth_ttl_s: float = Field(
        default=0.25, ge=0, description="how long a measured queue depth counts"
    )

    max_body_bytes: int = Field(default=256 * KIB, ge=KIB)
    max_upload_bytes: int = Field(default=16 * MIB, ge=KIB)
    max_upload_pixels: int = Field(default=4096 * 4096, ge=1)
    max_conversation_bytes: int = Field(
        default=32 * MIB, ge=KIB, description="chats and judgements, pictures included"
    )
    max_queue_depth: int = Field(
        default=1000, ge=1, description="jobs that may wait in one service"
    )
    max_requests_per_key: int = Field(
        default=256, ge=1, description="generations of one key at once"
    )

    label_studio_uploads: Path | None = Field(
        default=None, description="where Label Studio keeps what it calls /data/upload/"
    )
    label_studio_local_files: Path | None = Field(
        default=None, description="the root of what Label Studio calls /data/local-files/?d="
    )
    label_studio_deadline_s: float = Field(
        default=90.0, gt=0, description="Label Studio waits 100 s, its ML_TIMEOUT_PREDICT"
    )

    def keys(self) -> list[str]:
        """The API keys; empty for an open server."""
        listed = self.api_keys.get_secret_value().split(",")
        return [key.strip() for key in listed if key.strip()]
