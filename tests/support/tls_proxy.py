"""TLS in front of a server that speaks none, on loopback, with a certificate authority of the test's own."""

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Authority:
    """Writes `ca.pem`, and for `localhost` and 127.0.0.1 `server.pem` (certificate and key), into a folder."""

    def __init__(self, folder: Path, name: str = "authority of a test"):
        key = ec.generate_private_key(ec.SECP256R1())
        self._key, self._name = key, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        limits = x509.BasicConstraints(ca=True, path_length=None)
        usage = x509.KeyUsage(*(use in ("sign", "crl") for use in _USES))
        itself = self._certificate(self._name, key, [(limits, True), (usage, True)])
        self.ca, self.server = folder / "ca.pem", folder / "server.pem"
        self.ca.write_bytes(_pem(itself))
        named = x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        )
        server_key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        private = server_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self.server.write_bytes(_pem(self._certificate(subject, server_key, [(named, False)])) + private)

    def _certificate(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, extensions: list[tuple[x509.ExtensionType, bool]]
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        owner = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        for extension, critical in [*extensions, (issuer, False), (owner, False)]:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self._key, hashes.SHA256())


_USES = ("signature", "commitment", "encipherment", "data", "agreement", "sign", "crl", "encipher", "decipher")


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


class TlsProxy:
    """Passes on what comes in over TLS to `port`, and back. A thread a direction: for a few connections."""

    def __init__(self, port: int, authority: Authority):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(authority.server)
        self._context, self._to = context, port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self.connections = 0  # that were let through
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                raw, _ = self._listening.accept()
            except OSError:
                return  # it was stopped
            threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        try:
            raw.settimeout(20)
            inside = self._context.wrap_socket(raw, server_side=True)
            inside.settimeout(None)
            behind = socket.create_connection(("127.0.0.1", self._to), 5)
            behind.settimeout(None)
        except OSError:  # the other side does not trust us, or nobody is there
            raw.close()
            return
        for one in (inside, behind):  # else small answers wait for 40 ms
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connections += 1
        threading.Thread(target=_pass_on, args=(behind, inside), daemon=True).start()
        _pass_on(inside, behind)


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    """Until one of them is closed; then both are."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for one in (source, target):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
