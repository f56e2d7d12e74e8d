"""Settings of the fabric, read from the environment once; nothing else reads it.

``NATS_URL`` and ``GESSO_NATS_*`` say where the broker is, ``GESSO_JOB_*`` how jobs behave and
``GESSO_<SERVICE>_*`` how one service is deployed. Secrets never appear when settings are printed.
"""

from typing import Any, Literal, Self, get_args

from gesso_contracts import limits
from gesso_core.errors import ConfigError
from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

Role = Literal["admin", "gateway", "autoencoder", "diffusion", "autoregressive", "annotation"]
ROLES: tuple[Role, ...] = get_args(Role)


def role_of(service: str) -> Role:
    """The role in which ``service`` logs in; it has the service's name."""
    for role in ROLES[2:]:
        if role == service:
            return role
    known = ", ".join(ROLES[2:])
    raise ConfigError(f"nats.conf has no role for service {service!r}; it has {known}")


class BusSettings(BaseSettings):
    """Where the broker is and how to log in; times in seconds."""

    model_config = SettingsConfigDict(
        env_prefix="GESSO_NATS_", frozen=True, populate_by_name=True, extra="ignore"
    )

    url: str = Field(
        default="nats://127.0.0.1:4222", validation_alias=AliasChoices("NATS_URL", "GESSO_NATS_URL")
    )
    admin_password: SecretStr | None = None
    gateway_password: SecretStr | None = None
    autoencoder_password: SecretStr | None = None
    diffusion_password: SecretStr | None = None
    autoregressive_password: SecretStr | None = None
    annotation_password: SecretStr | None = None
    connect_timeout_s: float = Field(default=5.0, gt=0)
    reconnect_wait_s: float = Field(default=0.25, gt=0)
    request_timeout_s: float = Field(default=5.0, gt=0)

    def password(self, role: Role) -> str | None:
        """The password of ``role``; ``None`` leaves logging in to the URL."""
        secret: SecretStr | None = getattr(self, f"{role}_password")
        return secret.get_secret_value() if secret else None


class JobSettings(BaseSettings):
    """How jobs are kept, retried and buried; times in seconds."""

    model_config = SettingsConfigDict(env_prefix="GESSO_JOB_", frozen=True, extra="ignore")

    ack_wait_s: float = Field(
        default=30.0, gt=0, description="silence after which a job is given away"
    )
    max_attempts: int = Field(
        default=3, ge=1, description="starts before a job goes to the dead letters"
    )
    retry_delay_s: float = Field(default=1.0, gt=0, description="first delay; doubles up to 30 s")
    retry_window_s: float = Field(
        default=600.0, gt=0, description="how long to wait for a missing part"
    )
    max_ack_pending: int = Field(
        default=1000, ge=1, description="jobs of one service that run at once"
    )
    fetch_expires_s: float = Field(default=5.0, gt=0)
    stop_grace_s: float = Field(
        default=15.0, gt=0, description="what running jobs get when a replica stops"
    )
    state_ttl_s: float = Field(default=7 * 24 * 3600.0, gt=0)
    blob_ttl_s: float = Field(default=24 * 3600.0, gt=0)
    dead_letter_ttl_s: float = Field(default=14 * 24 * 3600.0, gt=0)
    duplicate_window_s: float = Field(default=120.0, gt=0)
    max_queue_bytes: int = Field(default=1024 * limits.MIB, ge=limits.MIB)
    max_blob_bytes: int = Field(default=4 * 1024 * limits.MIB, ge=limits.MIB)
    save_progress_every_s: float = Field(default=1.0, ge=0)
    previews_per_s: float = Field(default=4.0, gt=0)


class ServiceSettings(BaseSettings):
    """How one service is deployed. Build it with ``for_service``; subclass it for model options."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore")

    slots: int = Field(default=1, ge=1, description="jobs that one replica runs at once")
    rpc_concurrency: int = Field(
        default=4, ge=1, description="calls that one replica works on at once"
    )
    rpc_queue: int = Field(
        default=64, ge=0, description="calls that may wait before a replica says 503"
    )
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    upscale_delay_s: float = Field(default=5.0, ge=0)
    downscale_delay_s: float = Field(default=60.0, ge=0)
    backlog_per_slot: float = Field(
        default=2.0, gt=0, description="jobs per slot, waiting ones included, before scaling up"
    )
    backlog_poll_s: float = Field(default=2.0, gt=0)
    num_cpus: float = Field(default=0.5, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    resources: dict[str, float] = Field(default_factory=dict, description="custom Ray resources")
    max_ongoing_requests: int = Field(
        default=8, ge=1, description="of Ray Serve; work comes over NATS, so few are needed"
    )
    ready_timeout_s: float = Field(default=300.0, gt=0)
    broker_lost_s: float = Field(default=60.0, gt=0, description="without broker: then unhealthy")
    metrics_port: int | None = Field(
        default=None, ge=0, le=65535, description="loopback; 0 takes a free one"
    )

    @classmethod
    def for_service(cls, service: str, **values: Any) -> Self:
        """Settings of ``service`` from ``GESSO_<SERVICE>_*``; ``values`` win over those."""
        prefix = f"GESSO_{service.upper().replace('-', '_')}_"
        return cls(**{"_env_prefix": prefix, **values})


class LogSettings(BaseSettings):
    """How to log: level, and one line of text or of JSON per record."""

    model_config = SettingsConfigDict(env_prefix="GESSO_LOG_", frozen=True, extra="ignore")

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
