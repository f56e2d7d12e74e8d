"""One gateway process: the application under uvicorn."""

import uvicorn

from gesso_services.gateway.app import create_app
from gesso_services.gateway.settings import GatewaySettings
from gesso_services.runtime.log import configure_logging
from gesso_services.runtime.settings import BusSettings

GRACE_S = 5


def run(settings: GatewaySettings | None = None, bus_settings: BusSettings | None = None) -> None:
    """Serve until a signal comes; open streams get a few seconds to end."""
    settings = settings or GatewaySettings()
    configure_logging("gateway")
    uvicorn.run(
        create_app(settings, bus_settings),
        host=settings.host,
        port=settings.port,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )


if __name__ == "__main__":
    run()
