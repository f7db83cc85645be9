#!/bin/sh
# Debian's Chromium for tests/browser: Playwright's own download is a browser build from elsewhere,
# the distribution's package is not. Does nothing when /usr/bin/chromium is already there.
set -eu

[ -x /usr/bin/chromium ] && exit 0

if ! command -v apt-get >/dev/null; then
    echo "tests/browser needs /usr/bin/chromium, and there is no apt-get here to install it with" >&2
    exit 1
fi

as_root=""
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || {
        echo "tests/browser needs /usr/bin/chromium: as root, run: apt-get install chromium" >&2
        exit 1
    }
    as_root="sudo"
fi

$as_root apt-get update -qq
$as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
