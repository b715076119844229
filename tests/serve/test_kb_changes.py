"""Documents come and go over HTTP: whole or not at all, one at a time, under names that are only data."""

import asyncio
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from mogine.errors import RequestError
from mogine.kb.embedders import NoEmbedder
from mogine.kb.generations import Generations
from mogine.kb.passages import document_id
from mogine.serve.receive import MAX_NAME_CHARS, file_name
from mogine.settings import Settings, load_settings
from tests.kb.conftest import make_document
from tests.serve.test_kb import ADMIN, assert_envelope, ingest, ready, serving, words

__all__ = ["words"]

TEXT = "# 退款\n\n七天内可以退款。\n".encode()
Files = list[tuple[str, tuple[str, bytes]]]


def one(name: str, data: bytes = TEXT) -> Files:
    return [("file", (name, data))]


async def send(client: httpx.AsyncClient, files: Files) -> httpx.Response:
    return await client.post("/api/documents", files=files, headers=ADMIN)


async def found(client: httpx.AsyncClient, question: str) -> list[str]:
    body = (await client.get("/api/search", params={"q": question})).json()
    return [result["source"] for result in body["results"]]


def nothing_left(settings: Settings) -> bool:
    uploads = settings.data_path / "uploads"
    return not uploads.exists() or not list(uploads.iterdir())


async def test_uploaded_document_is_found_at_once_and_can_be_removed(words: Settings) -> None:
    async with serving(words) as client:
        response = await send(client, one("退货.md"))
        assert response.status_code == 201, response.text
        body = response.json()
        id = document_id("upload:退货.md")
        assert body["documents"] == [{"id": id, "source": "upload:退货.md", "status": "added"}]
        assert (body["generation"], body["passages"], body["failing_tests"]) == ("g000001", 1, [])
        assert await found(client, "退款") == ["upload:退货.md"]
        again = await send(client, one("退货.md"))
        assert (again.status_code, again.json()["documents"][0]["status"]) == (200, "unchanged")
        changed = await send(client, one("退货.md", "三十天内可以退款。".encode()))
        assert (changed.status_code, changed.json()["documents"][0]["status"]) == (201, "changed")
        shown = (await client.get(f"/api/documents/{id}", headers=ADMIN)).json()
        assert [passage["text"] for passage in shown["passages"]] == ["三十天内可以退款。"]
        gone = await client.delete(f"/api/documents/{id}", headers=ADMIN)
        assert gone.json() == {
            "generation": "g000003", "removed": ["upload:退货.md"], "failing_tests": [],
        }  # fmt: skip
        assert await found(client, "退款") == []
        assert_envelope(await client.delete(f"/api/documents/{id}", headers=ADMIN), 404, "not_found")
    assert nothing_left(words)


async def test_several_documents_come_as_one_change(words: Settings) -> None:
    files = [*one("a.md"), *one("b.csv", b"question,answer\nWhen?,At nine.\n")]
    async with serving(words) as client:
        body = (await send(client, files)).json()
        assert [d["source"] for d in body["documents"]] == ["upload:a.md", "upload:b.csv"]
        assert body["generation"] == "g000001"


async def test_one_document_that_cannot_be_read_leaves_all_out(words: Settings) -> None:
    """P37"""
    ingest(words, make_document("a.md", "old"))
    async with serving(words) as client:
        await ready(client)
        message = assert_envelope(
            await send(client, [*one("good.md"), *one("torn.pdf", b"%PDF-1.7 torn")]), 422, "bad_document"
        )
        assert message.startswith("torn.pdf is damaged")
        assert await found(client, "退款") == []
    assert Generations(words.kb_path).current_name() == "g000001"
    assert nothing_left(words)


@pytest.mark.parametrize(
    ("name", "data", "status", "reason"),
    [
        ("a.zip", b"PK\x05\x06" + bytes(18), 415, "unsupported_media_type"),
        ("a.exe", b"MZ\x00\x01\x02" * 100, 415, "unsupported_media_type"),
        ("a.md", b"  \n", 422, "bad_document"),
        ("a.docx", b"no docx", 422, "bad_document"),
    ],
)
async def test_what_is_no_document_is_refused(
    words: Settings, name: str, data: bytes, status: int, reason: str
) -> None:
    async with serving(words) as client:
        assert name in assert_envelope(await send(client, one(name, data)), status, reason)


async def test_a_copy_of_a_known_document_is_refused_by_its_name(words: Settings) -> None:
    async with serving(words) as client:
        await send(client, one("a.md"))
        message = assert_envelope(await send(client, one("b.md")), 422, "bad_document")
    assert "same content as upload:a.md" in message


async def test_changes_are_for_the_admin_and_refused_before_the_body_is_read(words: Settings) -> None:
    """B13"""
    async with serving(words) as client:
        assert_envelope(await client.post("/api/documents", files=one("a.md")), 401, "unauthorized")
        assert_envelope(await client.delete("/api/documents/x"), 401, "unauthorized")
    assert Generations(words.kb_path).current_name() is None


# --- bodies --------------------------------------------------------------------------------------


async def test_too_large_bodies_are_refused_announced_or_not(home: Path, words: Settings) -> None:
    small = {
        "MOGINE_EMBEDDER": "none", "MOGINE_ADMIN_TOKEN": "test-admin-token-" * 3, "MOGINE_KB_PORT": "0",
        "MOGINE_MAX_UPLOAD_BYTES": "1024",
    }  # fmt: skip
    settings = load_settings(small, home)

    async def unannounced() -> Any:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.md"\r\n\r\n'
        yield b"a" * 2000
        yield b"\r\n--x--\r\n"

    headers = {**ADMIN, "Content-Type": "multipart/form-data; boundary=x"}
    async with serving(settings) as client:
        assert_envelope(await send(client, one("a.md", b"a" * 100_000)), 413, "payload_too_large")
        assert_envelope(await send(client, one("a.md", b"a" * 2000)), 413, "payload_too_large")
        response = await client.post("/api/documents", content=unannounced(), headers=headers)
        assert_envelope(response, 413, "payload_too_large")
        two = [*one("a.md", b"a" * 600), *one("b.md", b"b" * 600)]
        assert_envelope(await send(client, two), 413, "payload_too_large")
    assert nothing_left(settings)


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("application/json", b"{}", 415),
        ("multipart/mixed; boundary=x", b"--x--\r\n", 415),
        ("multipart/form-data", b"", 400),
        ("multipart/form-data; boundary=" + "x" * 100, b"", 400),
        ("multipart/form-data; boundary=x", b"", 400),
        ("multipart/form-data; boundary=x", b"--y\r\n\r\n", 400),
        ("multipart/form-data; boundary=x", b"--x--\r\n", 400),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--", 400),
        ("multipart/form-data; boundary=x", b"--x\r\nno header at all", 400),
        ("multipart/form-data; boundary=x", b"--x\r\n" * 10_000, 400),
        ("multipart/form-data; boundary=x",
         b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.md"\r\n'
         b"Content-Transfer-Encoding: base64\r\n\r\nYQ==\r\n--x--\r\n", 415),
        ("multipart/form-data; boundary=x",
         b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.md"\r\n'
         b"Content-Encoding: gzip\r\n\r\nYQ==\r\n--x--\r\n", 415),
        ("multipart/form-data; boundary=x",
         b"--x\r\nContent-Type: multipart/mixed; boundary=y\r\n\r\n--y\r\n\r\n--y--\r\n--x--\r\n", 400),
    ],
)  # fmt: skip
async def test_broken_bodies_are_the_senders_fault(
    words: Settings, kind: str, body: bytes, status: int
) -> None:
    """B20, P41."""
    async with serving(words) as client:
        response = await client.post("/api/documents", content=body, headers={**ADMIN, "Content-Type": kind})
        assert response.status_code == status, response.text
        assert response.json()["error"]["code"] == status
    assert nothing_left(words)


async def test_more_files_than_allowed_and_names_given_twice_are_refused(words: Settings) -> None:
    many = [file for n in range(21) for file in one(f"{n}.md", f"text {n}".encode())]
    async with serving(words) as client:
        assert_envelope(await send(client, many), 413, "payload_too_large")
        twice = [*one("a.md"), *one("x/a.md", b"other")]
        assert_envelope(await send(client, twice), 400, "invalid_request", "filename")


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\x\\a.docx", "a.docx"),
        ("/abs/olute.md", "olute.md"),
        ("a\x00b\x1b[31m.md", "ab[31m.md"),
        ("$(touch x).md", "$(touch x).md"),
        ("=cmd|x.csv", "=cmd|x.csv"),
        ("a\r\nX: y.md", "a X: y.md"),
        ("退" * 300 + ".pdf", "退" * (MAX_NAME_CHARS - 4) + ".pdf"),
    ],
)
def test_a_file_name_is_data(given: str, name: str) -> None:
    """P36, B25"""
    assert file_name(given) == name


@pytest.mark.parametrize("given", ["", "/", "..", "a/..", "\x00", " . "])
def test_a_name_that_names_nothing_is_refused(given: str) -> None:
    with pytest.raises(RequestError):
        file_name(given)


async def test_names_that_would_climb_write_nothing_outside(words: Settings) -> None:
    """P36, B25"""
    before = {path for path in words.home.parent.rglob("*") if "data" not in path.parts}
    async with serving(words) as client:
        response = await send(client, one("../../../evil.md"))
    assert response.json()["documents"][0]["source"] == "upload:evil.md"
    assert {path for path in words.home.parent.rglob("*") if "data" not in path.parts} == before
    assert not list(words.home.parent.rglob("evil*"))


# --- one at a time -------------------------------------------------------------------------------


async def test_a_second_change_is_told_to_come_again(words: Settings) -> None:
    async with serving(words) as client:
        with Generations(words.kb_path).begin(NoEmbedder()):
            response = await send(client, one("a.md"))
            assert_envelope(response, 503, "overloaded")
            assert response.headers["Retry-After"] == "5"
        both = await asyncio.gather(send(client, one("a.md")), send(client, one("b.md", b"other text")))
        assert sorted(response.status_code for response in both) == [201, 503]
        assert (await send(client, one("c.md", b"third text"))).status_code == 201


async def test_searches_go_on_while_documents_change(words: Settings) -> None:
    ingest(words, make_document("a.md", "退款"))
    async with serving(words) as client:
        await ready(client)
        change = asyncio.create_task(send(client, one("b.md", "发票".encode())))
        answers = 0
        while not change.done():
            assert "a.md" in await found(client, "退款")
            answers += 1
        assert (await change).status_code == 201
        assert answers > 5


async def test_who_leaves_while_the_change_runs_leaves_no_process_and_no_file(words: Settings) -> None:
    async with serving(words) as client:
        leaving = asyncio.create_task(send(client, one("a.md")))
        async with asyncio.timeout(30):
            while not _children():  # noqa: ASYNC110 - a process says nothing when it starts
                await asyncio.sleep(0.005)
            leaving.cancel()
            while _children() or not nothing_left(words):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            while (  # noqa: ASYNC110
                response := await send(client, one("b.md", b"other"))
            ).status_code == 503:
                await asyncio.sleep(0.02)
        assert response.status_code == 201


def _children() -> list[str]:
    """The command lines of this process's children that change documents."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            line = path.with_name("cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and "ingest.clerk" in line and fields[0] != "Z":
            found.append(line)
    return found


async def test_a_base_that_cannot_be_written_is_told_without_a_path(
    words: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    words.kb_path.parent.mkdir(exist_ok=True)
    words.kb_path.write_text("a file in its place")
    async with serving(words) as client:
        response = await send(client, one("a.md"))
        assert_envelope(response, 500, "internal_error")
        assert str(words.home) not in response.text
    assert str(words.kb_path) in caplog.text


async def test_failing_tests_are_told_with_the_change(words: Settings) -> None:
    (words.home / "kb-tests.jsonl").write_text('{"question": "退款", "contains": "七天"}\n')
    async with serving(words) as client:
        await send(client, one("a.md"))
        body = (await send(client, one("a.md", "退款不行".encode()))).json()
        assert body["failing_tests"] == ["退款"]


async def test_company_follows_the_file_without_a_restart(words: Settings) -> None:
    site = words.home / "site.toml"
    site.write_text('[company]\nname = "one"\n')
    async with serving(words) as client:
        first = await client.get("/api/company_info")
        site.write_text('[company]\nname = "another"\n')
        second = await client.get("/api/company_info", headers={"If-None-Match": first.headers["ETag"]})
        assert (first.json()["name"], second.json()["name"]) == ("one", "another")
        site.write_text("[company\n")
        assert (await client.get("/api/company_info")).json()["name"] == "another"
