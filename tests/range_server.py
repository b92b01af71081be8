"""Serve the files of a folder in byte ranges, as web servers of scenes do.

`python range_server.py FOLDER` prints the port. It must be a separate process: GDAL holds Python's global lock while
it opens an address, so a thread of the test process could not answer.
"""

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeHandler(SimpleHTTPRequestHandler):
    """Answers GET requests with the bytes that the Range header asks for."""

    def do_GET(self):
        content = Path(self.translate_path(self.path)).read_bytes()
        start, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")
        piece = content[int(start) : int(end or len(content)) + 1]
        self.send_response(206)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {start}-{int(start) + len(piece) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        self.wfile.write(piece)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, directory=sys.argv[1]))
    print(server.server_port, flush=True)
    server.serve_forever()
