"""Doubao on Volcengine Ark: an OpenAI-compatible vendor with its own addresses, models and codes."""

from mogine.providers.compatible import CompatibleDialect
from mogine.providers.vendor import Vendor, VendorProvider
from mogine.settings import DoubaoSettings
from mogine.upstream import Client, Retries

# The default model is kept for homes that still have it under contract; new accounts get a 404.
ARK = Vendor(
    label="Volcengine Ark",
    key_setting="DOUBAO_API_KEY",
    model_setting="DOUBAO_MODEL",
    url_setting="DOUBAO_BASE_URL",
    retired={"doubao-1-5-thinking-vision-pro-250428": "doubao-seed-2-1-turbo-260628"},
)


def provider(settings: DoubaoSettings, client: Client, retries: Retries | None = None) -> VendorProvider:
    """The provider `doubao`."""
    dialect = CompatibleDialect(settings.base_url)
    return VendorProvider("doubao", settings.model, ARK, dialect, client, settings.keys, retries)
