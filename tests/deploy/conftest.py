"""Our servers, as the tests of the servers start them."""

from tests.serve.conftest import serve as serve
