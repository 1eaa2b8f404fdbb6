#!/usr/bin/env bash
# Fetches a data set or weights, checks them against a known hash and unpacks them where the program looks for them.
# Needs bash, curl and python3. Nothing is unpacked, and nothing gets its final name, before its hash is right.
#
# A new source is one line of the table:
#   name | part | folder under --to | archive | its bytes | bytes unpacked | hash | terms | URLs, tried in order
# The folder ends with the archive's own top folder; a .pth is no archive and is copied into it as it is. "Bytes
# unpacked" is rounded up, file system blocks included: it serves the free-space check alone. Third parties' copies
# and plain http are safe because of the hash.
# Exit codes: 0 done, 2 usage, 3 data, 5 disk, 6 another download of the same set is running, 1 anything else.
set -euo pipefail
set -f  # URLs hold question marks

table='
CelebA||CelebA/img_align_celeba|img_align_celeba.zip|1443490838|2000000000|sha256:46fb89443c578308acf364d7d379fe1b9efb793042c0af734b6112e4fd3a8c74|non-commercial research only, do not redistribute (https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html)|https://drive.usercontent.google.com/download?id=0B7EVK8r0v71pZjFTYXZWM3FlRnM&export=download&confirm=t https://s3.amazonaws.com/pytorch-tutorial-assets/img_align_celeba.zip https://cseweb.ucsd.edu/~weijian/static/datasets/celeba/img_align_celeba.zip
LSUN|church_outdoor|LSUN/church_outdoor_train_lmdb|church_outdoor_train_lmdb.zip|2448463466|3000000000|sha256:91128ae026840ac0c5982b4445ab5fc4e092d6847cca76793b2b1a0815c2e74a|no licence is stated; third parties own the pictures: research only, do not redistribute (https://www.yf.io/p/lsun)|http://dl.yf.io/lsun/scenes/church_outdoor_train_lmdb.zip
CIFAR10||CIFAR10/cifar-10-batches-py|cifar-10-python.tar.gz|170498071|187000000|md5:c58f30108f718f92721af3b95e74349a|no licence is stated; the authors ask to be cited (https://www.cs.toronto.edu/~kriz/cifar.html)|https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz
VGG16||VGG16|vgg16-397923af.pth|553433881|554000000|sha256:397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0|weights of torchvision, trained on ImageNet, whose pictures are for non-commercial research (https://github.com/pytorch/vision#pre-trained-model-license)|https://download.pytorch.org/models/vgg16-397923af.pth
Inception||Inception|weights-inception-2015-12-05-6726825d.pth|95628359|96000000|sha256:6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2|Apache License 2.0 (TensorFlow weights, converted by torch-fidelity: https://github.com/toshas/torch-fidelity)|https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth
'
tries=5  # per URL
pause=3  # seconds; the n-th retry waits n times as long

say() { printf 'download.sh: %s\n' "$@"; }
fail() { local code=$1; shift; say "$@" >&2; exit "$code"; }
gb() { awk -v b="$1" 'BEGIN { if (b < 1e7) printf "%d bytes", b; else printf "%.2f GB", b / 1e9 }'; }
size_of() { if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }

usage() {
    echo 'usage: bash download.sh NAME [PART] [--to DIR] [--mirror URL] [--from-file FILE]'
    echo '  --to DIR          where the data sets live (default: data)'
    echo '  --mirror URL      another copy of the archive, tried first'
    echo '  --from-file FILE  use an archive that you downloaded yourself, in a browser for instance'
    echo 'Data sets and weights (NAME PART, size of the download):'
    local n p archive_bytes
    while IFS='|' read -r n p _ _ archive_bytes _; do
        [ -z "$n" ] || printf '  %-24s %s\n' "$n $p" "$(gb "$archive_bytes")"
    done <<<"$table"
}

name='' part='' to=data mirror='' from=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --to | --mirror | --from-file)
            case ${2:-} in '' | --*) fail 2 "$1 needs a value; bash download.sh --help lists the options" ;; esac
            case $1 in --to) to=${2%/} ;; --mirror) mirror=$2 ;; *) from=$2 ;; esac
            shift ;;
        -*) fail 2 "unknown option $1; bash download.sh --help lists the options" ;;
        *) if [ -z "$name" ]; then name=$1; elif [ -z "$part" ]; then part=$1; else
               fail 2 "$1 is one word too many; give one data set at a time"; fi ;;
    esac
    shift
done
[ -n "$name" ] || { usage >&2; exit 2; }
[ -z "$mirror" ] || [ -z "$from" ] || fail 2 "--mirror and --from-file exclude each other: leave one out"
[ -z "$from" ] || [ -f "$from" ] || fail 2 "--from-file $from: no such file; give the path of the archive"

row=''
while IFS='|' read -r n p rest; do  # without PART, the first row of that name
    if [ "$n" = "$name" ] && { [ -z "$part" ] || [ "$p" = "$part" ]; }; then part=$p row=$rest; break; fi
done <<<"$table"
[ -n "$row" ] || { say "unknown data set: $name $part" >&2; usage >&2; exit 2; }
IFS='|' read -r folder file bytes unpacked hash terms urls <<<"$row"
command -v python3 >/dev/null || fail 1 "python3 is needed: install it or activate its environment"
[ -n "$from" ] || command -v curl >/dev/null || fail 1 "curl is needed: install it, or use --from-file"

id=$name${part:+-$part}
target=$to/$folder partial=$to/$file.part lock=$to/.$id.lock scratch=$to/.$id.unpack
done_already() {
    if [ -e "$target/.complete" ]; then
        say "$id is complete in $target; to fetch it again, delete that folder first"
        exit 0
    fi
}
done_already
[ ! -e "$target" ] || fail 3 "$target exists, but was not finished by this script: move it away or delete it"
say "$id, terms of use: $terms"

# Python runs as "python3 -IS": isolated, so that no module of the current folder stands in for one of its own.
child='' owned=''
run() {  # in the background, since bash answers a signal only after a foreground command has ended
    "$@" <&0 &
    child=$!
    local code=0
    wait "$child" || code=$?
    child=''
    return "$code"
}
cleanup() {
    if [ -n "$child" ]; then kill "$child" 2>/dev/null || true; wait "$child" 2>/dev/null || true; fi
    [ -z "$owned" ] || rm -rf "$scratch" "$lock"
}
interrupted() { fail "$1" "interrupted; run the same command again to go on from here"; }
trap cleanup EXIT
trap 'interrupted 129' HUP
trap 'interrupted 130' INT
trap 'interrupted 143' TERM

stale() {  # a lock of another host is never stale: its processes cannot be seen from here
    local host pid
    read -r host pid 2>/dev/null <"$lock/owner" && [ "$host" = "$HOSTNAME" ] || return 1
    ! kill -0 "$pid" 2>/dev/null && ! ps -p "$pid" >/dev/null 2>&1  # kill fails on other users' processes
}
take_lock() {
    if ! mkdir "$lock" 2>/dev/null; then
        [ -d "$lock" ] || fail 5 "cannot write in $to: check its permissions and free space, or choose another --to"
        # Of several that find the same stale lock one makes this folder; it looks again, as it may come late.
        if stale && mkdir "$lock/takeover" 2>/dev/null; then
            if stale; then owned=1; else rmdir "$lock/takeover"; fi
        fi
        [ -n "$owned" ] || fail 6 \
            "another download of $id into $to is running (host, process: $(cat "$lock/owner" 2>/dev/null))." \
            "Wait for it. If there is none, delete $lock and run this again."
    fi
    owned=1
    echo "$HOSTNAME $$" >"$lock/owner" || fail 5 "cannot write in $to: free space there, or choose another --to"
    rm -rf "$lock/takeover" "$scratch"
}

check_space() {
    local fetched missing free
    fetched=$(size_of "$partial")
    missing=$((fetched < bytes ? bytes - fetched : 0))
    [ -z "$from" ] || missing=0
    free=$(python3 -IS -c 'import shutil, sys; print(shutil.disk_usage(sys.argv[1]).free)' "$to")
    [ "$free" -ge $((missing + unpacked)) ] || fail 5 \
        "$to has $(gb "$free") free, needed are $(gb $((missing + unpacked))):" \
        "$(gb "$missing") to download and $(gb "$unpacked") unpacked. Free space, or choose another disk with --to."
}

is_archive() {  # torch.save wrote pickles (protocol 2) at first, zips later
    case $file:$(head -c 2 "$1" | od -An -tx1 | tr -d ' \n') in
        *.zip:504b | *.gz:1f8b | *.pth:8002 | *.pth:504b) ;;
        *) return 1 ;;
    esac
}

why=''
verify() {  # is $1 the archive of the table? If not, why says it.
    why="it is not a .${file##*.} file, perhaps a web page saved under that name"
    is_archive "$1" || return 1
    run python3 -IS - "$1" "${hash%%:*}" >"$lock/answer" <<'EOF' || { why="it cannot be read"; return 1; }
import hashlib, sys
digest = hashlib.new(sys.argv[2], usedforsecurity=False)  # machines in FIPS mode have md5 on these terms only
with open(sys.argv[1], "rb") as f:
    while block := f.read(1 << 20):
        digest.update(block)
print(digest.hexdigest())
EOF
    local got
    got=$(cat "$lock/answer")
    why="wrong ${hash%%:*}: expected ${hash#*:} ($bytes bytes), got $got ($(size_of "$1") bytes)"
    [ "$got" = "${hash#*:}" ]
}

fetch() {  # downloads $1 to $partial, going on from what is there; 1 when it cannot, and why says it
    local at_start before now most code http type attempt meter=-sS
    [ ! -t 2 ] || meter=-#
    at_start=$(size_of "$partial") now=$at_start most=$at_start
    for ((attempt = 0; attempt < tries && now < bytes; attempt++)); do
        run sleep $((attempt * pause))
        before=$now code=0 http='' type=''
        # Not curl's own --retry: it throws away what the failed try had fetched, even with -C -.
        run curl -fL -g "$meter" -C - -o "$partial" -w '%{http_code} %{content_type}' --proto '=http,https' \
            --connect-timeout 20 --speed-limit 1000 --speed-time 60 --url "$1" >"$lock/answer" || code=$?
        read -r http type <"$lock/answer" || true
        now=$(size_of "$partial")
        [ "$now" -le "$most" ] || most=$now attempt=0  # only tries that get no further count
        why="incomplete, $now of $bytes bytes (curl error $code)"
        case $code in
            1 | 3 | 60) return 1 ;;  # protocol, URL, certificate: no second try helps
            22) why="HTTP error $http"
                case $http in 408 | 429 | 5??) continue ;; *) return 1 ;; esac ;;
            23) fail 5 "cannot write $partial: free space in $to, then run the same command again to resume" ;;
            33) why="it cannot resume and sent ${type:-something else}"
                case $type in text/*) return 1 ;; esac  # a web page must not cost the bytes we have
                rm -f "$partial"; at_start=0 now=0 ;;
            *)  if [ "$now" -gt 0 ] && ! is_archive "$partial"; then
                    why="it sent ${type:-something} instead of a .${file##*.} file (a quota or error page?)"
                    rm -f "$partial"
                    return 1
                fi
                if [ "$code" = 0 ] && [ "$now" = "$before" ]; then
                    why="its file ends after $now bytes, expected are $bytes"
                    [ "$at_start" -gt 0 ] || rm -f "$partial"
                    return 1
                fi ;;
        esac
    done
    [ "$now" -ge "$bytes" ]
}

unpack() {  # $1 -> scratch -> target in one rename, so that a folder with .complete is a whole one
    local code=0
    run python3 -IS - "$1" "$file" "$scratch" "$target" "$hash" <<'EOF' || code=$?
import os, shutil, stat, sys, tarfile, zipfile, zlib
path, file, scratch, target, digest = sys.argv[1:]

def fail(code, message):
    print(f"download.sh: {message}", file=sys.stderr)
    sys.exit(code)

def check(name, is_plain):
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or ":" in parts[0] or ".." in parts or not is_plain:
        fail(3, f"{file} holds {name!r}, a link or a path out of its folder: not unpacked; please report it")

top = os.path.join(scratch, os.path.basename(target))
try:
    if file.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                check(info.filename, stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR))
            archive.extractall(scratch)
    elif file.endswith(".pth"):
        os.makedirs(top)
        shutil.copyfile(path, os.path.join(top, file))
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                check(member.name, member.isfile() or member.isdir())
            # Pythons before 3.10.12 have no filters; the check above holds without one.
            archive.extractall(scratch, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    if not os.path.isdir(top):
        fail(3, f"{file} holds no folder {os.path.basename(target)}: please report it")
    with open(os.path.join(top, ".complete"), "w") as f:
        f.write(f"{file} {digest}\n")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.rename(top, target)
except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
    fail(3, f"{file} is damaged ({error}): delete it and fetch it again")
except OSError as error:
    fail(5, f"cannot unpack: {error}. Free space or choose another --to, then run the same command again;"
            " the archive is kept")
EOF
    case $code in 0) ;; 3 | 5) exit "$code" ;; *) fail 1 "unpacking broke off: run the same command again" ;; esac
}

mkdir -p "$to" 2>/dev/null || fail 5 "--to $to: cannot make this folder; choose another one"
take_lock
done_already
check_space
if [ -n "$from" ]; then
    verify "$from" || fail 3 "--from-file $from: $why." "Download $file again, from ${urls%% *} for instance."
    archive=$from
else
    archive=''
    for url in $mirror $urls; do
        say "fetching $file ($(gb "$bytes"), $(gb "$(size_of "$partial")") here) from $url"
        if fetch "$url"; then
            if verify "$partial"; then archive=$partial; break; fi
            rm -f "$partial"
        fi
        say "$url: $why" >&2
    done
    [ -n "$archive" ] || fail 3 \
        "no source gave $file. Run the same command again later (it resumes), or add --mirror URL, or" \
        "download it in a browser, from ${urls%% *} for instance, and add --from-file FILE."
fi
say "hash is right; unpacking into $target"
unpack "$archive"
[ -n "$from" ] || rm -f "$partial"
say "$id is ready in $target"
