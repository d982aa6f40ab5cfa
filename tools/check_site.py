"""Checks a built site: every link inside of it leads somewhere, and nothing is loaded from anywhere else.

    python tools/check_site.py site

Prints what is wrong and fails, or how much was checked.
"""

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "object": "data"}
"""Attributes of which a browser loads the address by itself."""


class Page(HTMLParser):
    """The addresses of a page, those that a browser loads by itself, and the anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what a tag refers to."""
        found = {key: value or "" for key, value in attrs}
        self.anchors |= {found[key] for key in ("id", "name") if key in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if LOADS.get(tag) in found and found.get("rel") != "canonical":
            self.loads.append(found[LOADS[tag]])


def wrong(site: Path) -> Iterator[str]:
    """Every fault, in a line."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        name = path.relative_to(site)
        for address in page.loads:
            if urlsplit(address).netloc:
                yield f"{name} loads {address}"
        for address in [*page.links, *page.loads]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            if not target.exists():
                yield f"{name} refers to {address}, which is not there"
            elif parts.fragment and target.suffix == ".html":
                there = pages.get(site.resolve() / target.relative_to(site.resolve())) or pages[path]
                if unquote(parts.fragment) not in there.anchors and parts.path != "search.html":
                    yield f"{name} refers to {address}, where that place is not"
    for path in sorted(site.rglob("*.css")):
        for address in re.findall(
            r"(?:url\(|@import\s+)[\"']?((?:https?:)?//[^\"')]+)", path.read_text(encoding="utf-8")
        ):
            yield f"{path.relative_to(site)} loads {address}"


def main() -> int:
    """Check the site that is named on the command line."""
    site = Path(sys.argv[1]).resolve()
    faults = list(wrong(site))
    print(*faults, sep="\n", end="\n" if faults else "")
    print(f"{len(list(site.rglob('*.html')))} pages in {site}, {len(faults)} faults; begin with {site / 'index.html'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
