"""Parse the report's page: its elements, words and tables, and whether every element is closed."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Tables as lists of rows of (text, attributes), and every element with its attributes."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.tables: list[list[list[tuple[str, dict]]]] = []
        self.words: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == [], "an element was not closed"

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)
        if name == "table":
            self.tables.append([])
        elif name == "tr":
            self.tables[-1].append([])
        elif name in ("td", "th"):
            self.tables[-1][-1].append(("", dict(attributes)))

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open.pop() == name, f"{name} closes something else"

    def handle_data(self, data):
        if self.open:
            self.words.append((self.open[-1], data))
        if "table" in self.open and ("td" in self.open or "th" in self.open):
            text, attributes = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = text + data, attributes

    def titles(self) -> list[str]:
        return [data for name, data in self.words if name == "title"]
