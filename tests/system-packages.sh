#!/bin/sh
# What the tests need of the system: looked for, and installed with apt where that can be done without a password
# (Debian or Ubuntu, as root or with sudo that asks for none). On a terminal it asks first, unless CI is set. What is still missing is named; the tests that
# need it are then skipped by name (tests/needs.py). The exit status is always 0.
set -u
PATH="$PATH:/usr/sbin:/sbin"

present() { # one of these programs or files is there
    for thing; do
        case $thing in
            /*) [ -e "$thing" ] && return 0 ;;
            *) command -v "$thing" >/dev/null && return 0 ;;
        esac
    done
    return 1
}

missing() { # the Debian packages whose program or file (the same as in tests/needs.py) is not there
    present cc gcc clang || echo gcc libc6-dev
    present curl || echo curl
    present nginx || echo nginx-light
    present /usr/lib/nginx/modules/ngx_nchan_module.so || echo libnginx-mod-nchan
    present openssl || echo openssl
    present redis-server || echo redis-server
    present buildah || echo buildah
    present podman || echo podman
    present runc || echo runc
    present mmdebstrap || echo mmdebstrap
    present chromium chromium-browser || echo chromium
    present firefox-esr firefox || echo firefox-esr
    present WebKitWebDriver || echo webkit2gtk-driver
    present Xvfb || echo xvfb
    present javac || echo default-jdk-headless # `java Client.java` needs the compiler
    present node || echo nodejs
    present npm || echo npm
    present mount || echo mount
    present unshare || echo util-linux
}

packages=$(missing)
[ -n "$packages" ] || exit 0

sudo=''
[ "$(id -u)" -eq 0 ] || sudo='sudo -n'
install=yes
# A person is asked, a CI isn't.
if [ -t 0 ] && [ -t 1 ] && [ -z "${CI:-}" ] && [ "${SSEAPP_TEST_ALL:-}" != 1 ]; then
    printf 'Some tests need these packages of the system:\n%s\n' "$(echo $packages)"
    printf 'Install them with apt? Without them those tests are skipped. [y/N] '
    read -r install || install=no
fi
case $install in [yY]*) install=yes ;; *) install=no ;; esac
if [ $install = yes ] && command -v apt-get >/dev/null && $sudo true 2>/dev/null; then
    # Debian's own way to start no daemon of what gets installed, see invoke-rc.d(8).
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        trap '$sudo rm -f $policy' EXIT
        printf '#!/bin/sh\nexit 101\n' | $sudo tee $policy >/dev/null
        $sudo chmod +x $policy
    fi
    apt="$sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120"
    $apt update
    for package in $packages; do # one at a time: one that this release lacks is no reason to miss the others
        echo "installing $package"
        $apt install -y --no-install-recommends "$package" </dev/null >/dev/null
    done
fi

for package in $(missing); do
    echo "not installed: $package (the tests that need it are skipped)"
done
exit 0
