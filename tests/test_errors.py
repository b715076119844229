"""Every error of the family keeps the contract's table of status, type and reason."""

import pytest

from mogine import errors
from mogine.errors import ErrorEnvelope, MogineError, UpstreamRefused

TABLE = {
    "RequestError": (400, "invalid_request_error", "invalid_request", 2),
    "Unauthorized": (401, "authentication_error", "unauthorized", 2),
    "Forbidden": (403, "permission_error", "forbidden", 2),
    "NotFound": (404, "invalid_request_error", "not_found", 1),
    "MethodNotAllowed": (405, "invalid_request_error", "method_not_allowed", 2),
    "RequestTimeout": (408, "timeout_error", "request_timeout", 2),
    "TooLarge": (413, "invalid_request_error", "payload_too_large", 2),
    "UnsupportedMedia": (415, "invalid_request_error", "unsupported_media_type", 1),
    "UnreadableDocument": (422, "invalid_request_error", "bad_document", 1),
    "ContentFiltered": (400, "invalid_request_error", "invalid_request", 1),
    "RateLimited": (429, "rate_limit_error", "rate_limited", 6),
    "UpstreamBusy": (429, "rate_limit_error", "upstream_busy", 4),
    "UpstreamRefused": (502, "proxy_error", "upstream_refused", 4),
    "UpstreamBadResponse": (502, "proxy_error", "upstream_bad_response", 4),
    "UpstreamCut": (502, "proxy_error", "upstream_bad_response", 4),
    "UpstreamUnreachable": (502, "proxy_error", "upstream_error", 4),
    "AnswerTooLong": (502, "proxy_error", "answer_too_long", 4),
    "UpstreamError": (502, "proxy_error", "upstream_error", 4),
    "UpstreamUnavailable": (503, "server_error", "upstream_unavailable", 4),
    "UpstreamTimeout": (504, "proxy_error", "upstream_timeout", 4),
    "Unavailable": (503, "server_error", "overloaded", 1),
    "Locked": (503, "server_error", "overloaded", 5),
    "SettingsError": (500, "server_error", "internal_error", 2),
    "StoreError": (500, "server_error", "internal_error", 1),
    "MogineError": (500, "server_error", "internal_error", 1),
}


def family(cls: type[MogineError]) -> set[type[MogineError]]:
    return {cls}.union(*(family(child) for child in cls.__subclasses__()))


def test_the_table_names_every_error_there_is() -> None:
    ours = {cls.__name__ for cls in family(MogineError) if cls.__module__ == errors.__name__}
    assert ours == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_error_has_its_place_in_the_contract(name: str) -> None:
    cls = getattr(errors, name)
    assert (cls.status, cls.type, cls.default_reason, cls.exit_code) == TABLE[name]


def test_envelope_has_the_contracts_shape() -> None:
    error = UpstreamRefused("upstream answered 401", upstream_status=401, upstream_code="AuthenticationError")
    assert ErrorEnvelope.of(error, "id-1").to_dict() == {
        "error": {
            "message": "upstream answered 401",
            "type": "proxy_error",
            "code": 502,
            "reason": "upstream_refused",
            "request_id": "id-1",
            "upstream_status": 401,
            "upstream_code": "AuthenticationError",
        }
    }


def test_foreign_exception_tells_nothing_about_itself() -> None:
    body = ErrorEnvelope.of(ValueError("secret-key /home/x"), "id-2").to_dict()["error"]
    assert (body["code"], body["reason"]) == (500, "internal_error")
    assert "secret" not in str(body) and "/home" not in str(body)
