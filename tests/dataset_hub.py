"""The small Hub of hub_server.py, with datasets in place of models and the one more route that `datasets` asks for.

Run as a program, it prints as JSON what surgeon reads of the datasets named in its arguments: `datasets` looks at
HF_ENDPOINT only when it is imported, so that each endpoint takes a process of its own.
"""

import json
import re
import sys
import time
from urllib.parse import unquote, urlsplit

from hub_server import HubServer, _Handler

TREE = re.compile(r"/api/datasets/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)(?:/(?P<folder>.+))?")


class DatasetHub(HubServer):
    def __init__(self) -> None:
        super().__init__()
        self._http.RequestHandlerClass = type("Handler", (_DatasetHandler,), {"hub": self})


class _DatasetHandler(_Handler):
    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := TREE.fullmatch(path):
            if found := self.find(match["repo"], match["rev"]):
                below = f"{match['folder']}/" if match["folder"] else ""
                files = {name: content for name, content in found[1].items() if name.startswith(below)}
                listed = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
                self.reply(200, listed)
            return
        self.path = self.path.replace("/api/datasets/", "/api/models/", 1)
        self.path = self.path.removeprefix("/datasets")
        super().do_GET()


def read(specs: list[str]) -> dict[str, object]:
    """Return for each argument its documents as [where, text], or the message and hint of its error."""
    from surgeon.data.documents import documents
    from surgeon.errors import DataError

    answers: dict[str, object] = {}
    for spec in specs:
        try:
            answers[spec] = [[document.where, "\n".join(document.parts)] for document in documents(spec)]
        except DataError as error:
            answers[spec] = {"error": str(error), "hint": error.hint}
    return answers


if __name__ == "__main__":
    time.sleep = lambda _: None  # huggingface_hub waits 23 s before it gives up
    print(json.dumps(read(sys.argv[1:])))
