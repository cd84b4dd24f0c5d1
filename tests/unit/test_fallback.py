"""URLs and certificates of the way on by HTTP."""

import pytest

import kmcast


@pytest.mark.parametrize("url, host, port, path", [
    ("http://host", "host", 80, "/"), ("https://host/a?b=c", "host", 443, "/a?b=c"), ("HTTP://10.0.0.1:8080/i", "10.0.0.1", 8080, "/i"),
    ("http://[::1]:81/i#part", "::1", 81, "/i"), ("http://host?x", "host", 80, "/?x")])
def test_a_url_says_where_and_what(url, host, port, path):
    place = kmcast.Place(url)
    assert (place.host, place.port, place.path, place.secure) == (host, port, path, url.startswith("https"))


@pytest.mark.parametrize("url", ["", "host/image", "ftp://host/i", "http://", "http://me:secret@host/i", "http://host/a b",
                                 "http://host/a\r\nX: y", "http://host:port/"])
def test_what_is_no_url_is_wrong_usage(url):
    with pytest.raises(kmcast.Failure) as caught:
        kmcast.Place(url)
    assert caught.value.code == kmcast.USAGE


@pytest.mark.parametrize("location, url", [
    ("/b", "https://host:1/b"), ("b", "https://host:1/x/b"), ("//other/b", "https://other/b"), ("../b", "https://host:1/b"),
    ("?c", "https://host:1/x/a?c"), ("./b:c", "https://host:1/x/b:c"), ("https://other/b?c", "https://other/b?c")])
def test_a_redirect_leads_elsewhere(location, url):
    assert kmcast.Place("https://host:1/x/a?y=/z").target(location).url == url


@pytest.mark.parametrize("location, reason", [
    ("http://host/a", "not secure"), ("ftp://host/a", "no URL"), ("mailto:me", "no URL"), ("//[host/a", "no URL"), ("/a b", "no URL")])
def test_a_redirect_does_not_lead_out_of_tls_nor_of_http(location, reason):
    with pytest.raises(kmcast.Failure) as caught:
        kmcast.Place("https://host/a").target(location)
    assert reason in caught.value.reason and caught.value.code == kmcast.FAILED


@pytest.mark.parametrize("names, host, good", [
    ((("DNS", "host.example"),), "host.example", True), ((("DNS", "host.example"),), "HOST.example", True),
    ((("DNS", "*.example.net"),), "a.example.net", True), ((("DNS", "*.example.net"),), "a.b.example.net", False),
    ((("DNS", "*.net"),), "example.net", False), ((("DNS", "10.0.0.1"),), "10.0.0.1", False),
    ((("IP Address", "10.0.0.1"),), "10.0.0.1", True), ((("DNS", "other"),), "host", False), ((), "host", True), ((), "10.0.0.1", False)])
def test_a_certificate_names_its_hosts(names, host, good):
    certificate = {"subject": ((("commonName", "host"),),), "subjectAltName": names}
    assert kmcast.names_host(certificate, host) == good
