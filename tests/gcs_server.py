"""A server that answers as Google Cloud Storage does, as far as a run asks it: one bucket.

TensorFlow reaches it as a proxy, since it knows no other host than Google's. TensorStore and
google-cloud-storage are given its address.
"""

import contextlib
import http.server
import json
import pathlib
import re
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse


def path_of(folder, name):
    """The file of an object."""
    return folder / "objects" / urllib.parse.quote(name, safe="")


def names(folder):
    """The names of all objects."""
    return sorted(urllib.parse.unquote(path.name) for path in (folder / "objects").iterdir())


@contextlib.contextmanager
def start(folder):
    """Serves the objects of a folder from a process of its own while the context lasts.

    TensorFlow holds Python's lock while it reads, so that the process which reads cannot serve.

    Returns:
        The environment variables by which the libraries find the server.
    """
    (folder / "objects").mkdir(parents=True)
    hosts = "DNS:www.googleapis.com,DNS:storage.googleapis.com"
    make = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2")
    files = ("-keyout", folder / "key.pem", "-out", folder / "certificate.pem")
    names = ("-subj", "/CN=www.googleapis.com", "-addext", f"subjectAltName={hosts}")
    subprocess.run([*make, *files, *names], check=True, capture_output=True)
    command = [sys.executable, __file__, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        try:
            yield {
                "https_proxy": address,
                "no_proxy": "127.0.0.1",
                "CURL_CA_BUNDLE": str(folder / "certificate.pem"),
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
                "GCS_RETRY_CONFIG_MAX_RETRIES": "1",  # ten of up to half a minute otherwise
                "TENSORSTORE_GCS_HTTP_URL": address,
                "STORAGE_EMULATOR_HOST": address,
                "GOOGLE_CLOUD_PROJECT": "project",
            }
        finally:
            process.kill()


class Server(http.server.ThreadingHTTPServer):
    """The server, whose objects are files of a folder under their quoted names."""

    daemon_threads = True
    request_queue_size = 100  # TensorStore connects many times at once

    def __init__(self, folder):
        """Listens at a free port; the folder has the certificate and its key (`start`)."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.uploads, self.lock = folder, {}, threading.Lock()
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(folder / "certificate.pem", folder / "key.pem")

    def put(self, name, content):
        """Stores an object and returns its metadata."""
        path_of(self.folder, name).write_bytes(content)
        return self.about(name)

    def generation(self, name):
        """The number of an object's content, 0 if there is no object."""
        path = path_of(self.folder, name)
        return path.stat().st_mtime_ns if path.exists() else 0

    def about(self, name):
        """The metadata of an object."""
        size = path_of(self.folder, name).stat().st_size
        generation = self.generation(name)
        when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(generation / 1e9))
        numbers = {"size": str(size), "generation": str(generation), "metageneration": "1"}
        return {"name": name, "bucket": "bucket", "updated": when, "timeCreated": when, **numbers}

    def listing(self, query):
        """The objects below a prefix, with those below a further delimiter as one prefix."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], {}
        for name in names(self.folder):
            inside, found, _ = name.removeprefix(prefix).partition(delimiter or "\0")
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if found:
                prefixes[f"{prefix}{inside}{delimiter}"] = None
            else:
                items.append(self.about(name))
        return {"items": items[: int(query.get("maxResults", 1000))], "prefixes": [*prefixes]}


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_CONNECT(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            tls = self.server.tls.wrap_socket(self.connection, server_side=True)
            _Handler(tls, self.client_address, self.server)
        except OSError:  # the client has gone
            pass
        self.close_connection = True

    def do_any(self):
        body = self._body()
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        parts = [urllib.parse.unquote(part) for part in url.path.removeprefix("/").split("/")]
        with self.server.lock:
            status, headers, content = self._answer(parts, query, body)
        if isinstance(content, dict):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = do_any

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body, size = b"", None
        while size != 0:
            size = int(self.rfile.readline(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def _answer(self, parts, query, body):
        """Returns the status, the headers and the content of the answer to a request."""
        folder, method = self.server.folder, self.command
        exists = path_of(folder, parts[-1]).exists()
        match parts:
            case ["upload", "storage", "v1", "b", _, "o"]:
                return self._upload(query, body)
            case ["storage", "v1", "b", _, "storageLayout"]:
                return 200, {}, {"hierarchicalNamespace": {"enabled": False}}
            case ["storage", "v1", "b", name]:
                return 200, {}, {"name": name, "location": "US"}
            case ["storage", "v1", "b", _, "o"]:
                return 200, {}, self.server.listing(query)
            case ["storage", "v1", "b", _, "o", source, "rewriteTo", "b", _, "o", name]:
                about = self.server.put(name, path_of(folder, source).read_bytes())
                return 200, {}, {"done": True, "resource": about}
            case ["storage", "v1", "b", _, "o", name] if exists and method == "DELETE":
                path_of(folder, name).unlink()
                return 204, {}, b""
            case ["storage", "v1", "b", _, "o", name] if exists and "alt" not in query:
                return 200, {}, self.server.about(name)
            case ["storage", "v1", "b", _, "o", name] | ["bucket", name] if exists:
                return self._content(name)
        return 404, {}, {"error": {"code": 404}}

    def _upload(self, query, body):
        if "upload_id" in query:
            name = self.server.uploads[query["upload_id"]]
            return 200, {}, self.server.put(name, body)
        name = query["name"]
        expected = int(query.get("ifGenerationMatch", -1))
        if expected not in (-1, self.server.generation(name)):
            return 412, {}, {"error": {"code": 412}}
        if query["uploadType"] != "resumable":
            return 200, {}, self.server.put(name, body)
        session = str(len(self.server.uploads))
        self.server.uploads[session] = name
        host, path = self.headers["Host"], self.path.partition("?")[0]
        return 200, {"Location": f"https://{host}{path}?upload_id={session}"}, b""

    def _content(self, name):
        content = path_of(self.server.folder, name).read_bytes()
        headers = {"Content-Type": "application/octet-stream"}
        headers["x-goog-generation"] = self.server.generation(name)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return 200, headers, content
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if first >= len(content):
            return 416, {}, b""
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return 206, headers, content[first : last + 1]


if __name__ == "__main__":
    serving = Server(pathlib.Path(sys.argv[1]))
    print(f"http://127.0.0.1:{serving.server_address[1]}", flush=True)
    serving.serve_forever()
