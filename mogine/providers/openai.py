"""Any OpenAI-compatible server: vLLM, Ollama, llama.cpp, DeepSeek and others."""

from mogine.providers.compatible import CompatibleDialect
from mogine.providers.vendor import Vendor, VendorProvider
from mogine.settings import OpenAISettings
from mogine.upstream import Client, Retries

SERVER = Vendor(
    label="OpenAI-compatible server",
    key_setting="OPENAI_API_KEY",
    model_setting="OPENAI_MODEL",
    url_setting="OPENAI_BASE_URL",
    retired={},
)


def provider(settings: OpenAISettings, client: Client, retries: Retries | None = None) -> VendorProvider:
    """The provider `openai`; without a key it sends none."""
    dialect = CompatibleDialect(settings.base_url)
    return VendorProvider("openai", settings.model, SERVER, dialect, client, settings.keys, retries)
