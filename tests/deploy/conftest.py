"""Our servers, as the tests of the servers start them, and behind nginx."""

from tests.fronts.deployed import behind as behind
from tests.fronts.deployed import doubao as doubao
from tests.serve.conftest import serve as serve
