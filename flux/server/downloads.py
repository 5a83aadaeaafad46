"""Pictures from URLs into a dataset's folder, as JPEG. Reaches the network.

A URL comes from a stranger: it is followed over http and https alone, to public addresses alone, and what it
answers is bounded in bytes, pixels and time, and decoded before anything of it is kept.
"""

import asyncio
import ipaddress
import re
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

import httpx
from PIL import Image, UnidentifiedImageError

from flux import images, jsonfiles, outputs
from flux.data.pictures import NamedBytes
from flux.errors import FluxError
from flux.server.settings import MB

MOST_URLS = 1000
MOST_BYTES = 50 * MB  # of a picture's file
MOST_PIXELS = 100_000_000
MOST_REDIRECTS = 5
AT_ONCE = 8
TIMEOUT = 15.0  # seconds without a byte
PICTURE_SECONDS, ALL_SECONDS = 120.0, 1800.0
SOURCES = ".sources.json"  # in the dataset's folder: file -> the URL that it came from
AGENT = "flux-mlx"


class CheckedTransport(httpx.AsyncHTTPTransport):
    """Connects to addresses that were checked: each name is looked up once, here, and its address is used.

    So no redirect and no second answer of the name's server leads anywhere else. TLS is checked by the name.
    """

    def __init__(self, private: bool):
        # No connection is kept: it would be known by its address, and serve another name.
        super().__init__(limits=httpx.Limits(max_keepalive_connections=0), trust_env=False)
        self._private = private

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer a request, also one that a redirect leads to. FluxError where it may not go."""
        url = request.url
        if url.scheme not in ("http", "https"):
            raise FluxError(f"only http and https are followed, not {url.scheme}")
        address = await self._address(url.host, url.port or (443 if url.scheme == "https" else 80))
        extensions = {**request.extensions, "sni_hostname": url.host}
        there = url.copy_with(host=address)
        checked = httpx.Request(
            request.method, there, headers=request.headers, stream=request.stream, extensions=extensions
        )
        return await super().handle_async_request(checked)

    async def _address(self, host: str, port: int) -> str:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=1)  # 1: a stream
        except (OSError, UnicodeError):
            raise FluxError(f"the host {host[:100]} is not known") from None
        addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
        if not self._private and not all(map(is_public, addresses)):
            raise FluxError(f"the host {host[:100]} has a private, loopback or local address")
        return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address is of the public Internet, also where one of IPv6 stands for one of IPv4."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo and parsed.teredo[1])
        if parsed in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inner = ipaddress.IPv4Address(parsed.packed[-4:])
        if inner:
            return is_public(str(inner))
    return parsed.is_global and not parsed.is_multicast


async def download(urls: Sequence[str], folder: Path, private: bool) -> dict[str, str]:
    """The path of each URL's picture, or "Error: " and why there is none.

    A URL that was downloaded into the folder before gets the same file. private: whether private addresses
    are allowed. FluxError where somebody else writes into the folder.
    """
    with outputs.locked(folder):
        return await _into(urls, folder, private)


async def _into(urls: Sequence[str], folder: Path, private: bool) -> dict[str, str]:
    """As `download`, into a folder that nobody else writes into."""
    files = _names(list(dict.fromkeys(urls)), folder)
    timeout = httpx.Timeout(TIMEOUT)
    running = asyncio.Semaphore(AT_ONCE)
    end = time.monotonic() + ALL_SECONDS
    async with httpx.AsyncClient(
        transport=CheckedTransport(private),
        follow_redirects=True,
        max_redirects=MOST_REDIRECTS,
        timeout=timeout,
        trust_env=False,
        headers={"User-Agent": AGENT, "Accept": "image/*", "Accept-Encoding": "identity"},
    ) as client:

        async def one(url: str) -> str:
            async with running:
                return await _one(client, url, files[url], end)

        done = dict(zip(files, await asyncio.gather(*map(one, files)), strict=True))
    new = {Path(path).name: url for url, path in done.items() if not path.startswith("Error: ")}
    if new:
        _keep_sources(folder, new)
    return done


async def _one(client: httpx.AsyncClient, url: str, file: Path, end: float) -> str:
    """The file's path, or why there is none."""
    try:
        seconds = min(PICTURE_SECONDS, end - time.monotonic())
        content = await asyncio.wait_for(_fetch(client, url), seconds)
        await asyncio.to_thread(_save, content, url, file)
    except TimeoutError:
        return "Error: it took too long"
    except httpx.TimeoutException:
        return f"Error: no answer within {TIMEOUT:g} s"
    except httpx.TooManyRedirects:
        return f"Error: more than {MOST_REDIRECTS} redirects"
    except (httpx.HTTPError, httpx.InvalidURL, FluxError, OSError, ValueError) as error:
        return f"Error: {' '.join(str(error).split())[:300] or type(error).__name__}"
    return str(file)


async def _fetch(client: httpx.AsyncClient, url: str) -> bytes:
    if urllib.parse.urlsplit(url).scheme.lower() not in ("http", "https"):
        raise FluxError("only http and https are followed")
    async with client.stream("GET", url) as response:
        if response.status_code != 200:
            raise FluxError(f"the server answered {response.status_code} {response.reason_phrase}")
        content = bytearray()
        async for part in response.aiter_raw():
            content += part
            if len(content) > MOST_BYTES:
                raise FluxError(f"the file is larger than {MOST_BYTES // MB} MB")
    return bytes(content)


def _save(content: bytes, url: str, file: Path) -> None:
    """Decodes a picture and writes it as JPEG, what was transparent over white."""
    named = NamedBytes(content, "the answer")
    check_pixels(named)
    images.save(file, images.over_white(*images.load(named)))


def check_pixels(file: NamedBytes) -> None:
    """FluxError for a picture that says it has too many pixels; decodes none. Its position is kept."""
    try:
        with Image.open(file) as image:
            width, height = image.size
    except UnidentifiedImageError:
        raise FluxError(f"{file} is not a picture") from None
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        width = height = MOST_PIXELS
    file.seek(0)
    if width * height > MOST_PIXELS:
        raise FluxError(f"{file} is a picture of more than {MOST_PIXELS // 10**6} million pixels, or damaged")


# --- Names ---


def _names(urls: Sequence[str], folder: Path) -> dict[str, Path]:
    """A file for each URL, after the name in it: one that nothing else in the folder has."""
    path = folder / SOURCES
    sources = jsonfiles.read(path) if path.is_file() else {}
    known = {url: name for name, url in sources.items() if isinstance(url, str) and (folder / name).is_file()}
    taken = {file.stem.lower() for file in folder.iterdir()}  # two of one stem would share a caption's file
    files = {}
    for number, url in enumerate(urls, 1):
        name = known.get(url) or f"{_free(_stem(url) or f'image{number}', taken)}.jpg"
        taken.add(Path(name).stem.lower())
        files[url] = folder / name
    return files


def _stem(url: str) -> str:
    """The part of a URL that can name a file, "" where there is none."""
    try:
        name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]
    except ValueError:
        return ""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", name.rpartition(".")[0] or name).strip("-_")
    return stem[:80].rstrip("-_")


def _free(stem: str, taken: set[str]) -> str:
    names = [stem, *(f"{stem}-{number}" for number in range(2, MOST_URLS + len(taken) + 3))]
    return next(name for name in names if name.lower() not in taken)


def _keep_sources(folder: Path, new: dict[str, str]) -> None:
    path = folder / SOURCES
    jsonfiles.write(path, (jsonfiles.read(path) if path.is_file() else {}) | new)
