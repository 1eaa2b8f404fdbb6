#!/usr/bin/env bash
# Downloads a data set or weights, verifies the hash and unpacks the archive to where the program looks for it.
# Needs bash, curl and python3. An archive is unpacked only after its hash, if one is known, has been verified; the
# folder gets its final name only after everything is unpacked.
#
# A new source is one line of the table:
#   names | parts | folder under --to | archive | its bytes | bytes unpacked | hash | terms | URLs, tried in order |
#   the command to run next | where else to look if no URL works
# WORD stands for the requested part, or for the name if there are no parts; a name without a part selects the first
# part. In the next command, TO and TARGET are folders, SET is one of the folders in TARGET, and [...] is left out if
# --to is the program's default.
# With a hash, the last part of the folder is the archive's top folder; a .pth is not an archive and is copied into
# the folder. Third-party mirrors and plain http are then safe. Without a hash, the archive's layout is not known
# either: its only top folder, or else all of its contents, becomes the folder. Later downloads are checked against
# the sha256 of the first one. An unknown size is left empty: the server is asked. "Bytes unpacked" is rounded up and
# includes file system blocks: it serves the check before the download; after it, the archive gives the exact size.
#
# Files beside the data, named after the archive: .part, an incomplete download; .whole, a complete one that could not
# be unpacked yet; .sha256, the hash of the first download from a source that publishes none.
# Exit codes: 0 done, 2 usage, 3 data, 5 disk, 6 another download of the same set is running, 1 anything else.
set -euo pipefail
set -f  # URLs hold question marks

table='
CelebA||CelebA/img_align_celeba|img_align_celeba.zip|1443490838|2000000000|sha256:46fb89443c578308acf364d7d379fe1b9efb793042c0af734b6112e4fd3a8c74|non-commercial research only, do not redistribute (https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html)|https://drive.usercontent.google.com/download?id=0B7EVK8r0v71pZjFTYXZWM3FlRnM&export=download&confirm=t https://s3.amazonaws.com/pytorch-tutorial-assets/img_align_celeba.zip https://cseweb.ucsd.edu/~weijian/static/datasets/celeba/img_align_celeba.zip|python main.py --dataset celeb[ --image_path TO]|
LSUN|church_outdoor|LSUN/church_outdoor_train_lmdb|church_outdoor_train_lmdb.zip|2448463466|3000000000|sha256:91128ae026840ac0c5982b4445ab5fc4e092d6847cca76793b2b1a0815c2e74a|no licence is stated; third parties own the pictures: research only, do not redistribute (https://www.yf.io/p/lsun)|http://dl.yf.io/lsun/scenes/church_outdoor_train_lmdb.zip|python main.py --dataset lsun[ --image_path TO]|
LSUN|church_outdoor_val|LSUN/church_outdoor_val_lmdb|church_outdoor_val_lmdb.zip|5957308|8000000|sha256:34635b7547a3e51a15f942a4a4082dd6bc9cca381a953515cb2275c0eed50584|no licence is stated; third parties own the pictures: research only, do not redistribute (https://www.yf.io/p/lsun)|http://dl.yf.io/lsun/scenes/church_outdoor_val_lmdb.zip|python main.py --dataset lsun --image_path TARGET|
LSUN|bedroom bridge classroom conference_room dining_room kitchen living_room restaurant tower|LSUN/WORD_train_lmdb|WORD_train_lmdb.zip||||no licence is stated; third parties own the pictures: research only, do not redistribute (https://www.yf.io/p/lsun)|http://dl.yf.io/lsun/scenes/WORD_train_lmdb.zip|python main.py --dataset lsun --image_path TARGET|
LSUN|airplane bicycle bird boat bottle bus car cat chair cow dining_table dog horse motorbike person potted_plant sheep sofa train tv-monitor|LSUN/WORD_lmdb|WORD.zip||||no licence is stated; third parties own the pictures: research only, do not redistribute (https://www.yf.io/p/lsun)|http://dl.yf.io/lsun/objects/WORD.zip|python main.py --dataset lsun --image_path TARGET|
CIFAR10||CIFAR10/cifar-10-batches-py|cifar-10-python.tar.gz|170498071|187000000|md5:c58f30108f718f92721af3b95e74349a|no licence is stated; the authors ask to be cited (https://www.cs.toronto.edu/~kriz/cifar.html)|https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz|python main.py --dataset cifar10[ --image_path TO]|
Flowers||Flowers/jpg|102flowers.tgz||370000000|md5:52808999861908f626f3c1f4e79d11fa|no licence is stated (Visual Geometry Group, Oxford): research use (https://www.robots.ox.ac.uk/~vgg/data/flowers/102/)|https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz|python main.py --dataset folder --image_path TARGET|
100-shot-obama 100-shot-panda 100-shot-grumpy_cat AnimalFace-cat AnimalFace-dog||WORD|WORD.zip||||no licence is stated; third parties own the pictures, and the portrayed have rights of their own: research only, do not redistribute (https://data-efficient-gans.mit.edu/datasets/)|https://data-efficient-gans.mit.edu/datasets/WORD.zip|python main.py --model fastgan --dataset folder --image_path TARGET|The bundle few-shot holds the same pictures: bash download.sh few-shot puts them into few-shot/WORD.
few-shot||few-shot|few-shot-images.zip||||no licence is stated; third parties own the pictures (WikiArt, Pokemon, anime, portraits and more): research only, do not redistribute (https://arxiv.org/abs/2101.04775)|https://drive.usercontent.google.com/download?id=1aAJCZbXNHyraJ6Mi13dSbe7pTyfPXha0&export=download&confirm=t|python main.py --model fastgan --dataset folder --image_path TARGET/SET|
VGG16||VGG16|vgg16-397923af.pth|553433881|554000000|sha256:397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0|weights of torchvision, trained on ImageNet, whose pictures are for non-commercial research (https://github.com/pytorch/vision#pre-trained-model-license)|https://download.pytorch.org/models/vgg16-397923af.pth|--model fastgan takes it for metadata and LPIPS, --mode evaluate for --metrics nearest,lpips[; add --vgg_weights TARGET/vgg16-397923af.pth]|
Inception||Inception|weights-inception-2015-12-05-6726825d.pth|95628359|96000000|sha256:6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2|Apache License 2.0 (TensorFlow weights, converted by torch-fidelity: https://github.com/toshas/torch-fidelity)|https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth|--mode evaluate takes it for --metrics fid,kid,pr,is[; add --inception_weights TARGET/weights-inception-2015-12-05-6726825d.pth]|
'
tries=5  # per URL
pause=3  # seconds; the n-th retry waits n times as long

say() { printf 'download.sh: %s\n' "$@"; }
fail() { local code=$1; shift; say "$@" >&2; exit "$code"; }
gb() {
    awk -v b="$1" 'BEGIN {
        if (b == "") printf "size unknown"; else if (b < 1e7) printf "%d bytes", b; else printf "%.2f GB", b / 1e9 }'
}
has() { local word; for word in $2; do [ "$word" != "$1" ] || return 0; done; return 1; }  # is $1 a word of $2?
size_of() { if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }

usage() {
    echo 'usage: bash download.sh NAME [PART] [--to DIR] [--mirror URL] [--from-file FILE]'
    echo '  --to DIR          where the data sets live (default: data)'
    echo '  --mirror URL      another copy of the archive, tried first'
    echo '  --from-file FILE  use an archive that you downloaded yourself, in a browser for instance'
    echo 'Data sets and weights (NAME PART, size of the download):'
    local names n parts archive_bytes
    while IFS='|' read -r names parts _ _ archive_bytes _; do
        for n in $names; do
            case $parts in
                *' '*)
                    printf '  %-24s %s, PART being one of\n' "$n PART" "$(gb "$archive_bytes")"
                    fold -s -w 74 <<<"$parts" | sed 's/^/      /; s/ *$//' ;;
                *) printf '  %-24s %s\n' "$n $parts" "$(gb "$archive_bytes")" ;;
            esac
        done
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
               fail 2 "unexpected argument $1; give one data set at a time"; fi ;;
    esac
    shift
done
[ -n "$name" ] || { usage >&2; exit 2; }
[ -z "$mirror" ] || [ -z "$from" ] || fail 2 "--mirror and --from-file exclude each other: leave one out"
[ -z "$from" ] || [ -f "$from" ] || fail 2 "--from-file $from: no such file; give the path of the archive"

row=''
while IFS='|' read -r names parts rest; do
    if has "$name" "$names" && { [ -z "$part" ] || has "$part" "$parts"; }; then
        part=${part:-${parts%% *}}
        row=${rest//WORD/${part:-$name}}
        break
    fi
done <<<"$table"
[ -n "$row" ] || { say "unknown data set: $name${part:+ $part}" >&2; usage >&2; exit 2; }
IFS='|' read -r folder file bytes unpacked hash terms urls next elsewhere <<<"$row"
python3 -IS -c 'import hashlib, shutil, sys, tarfile, zipfile; sys.exit(sys.version_info < (3, 6))' 2>/dev/null ||
    fail 1 "a python3 of 3.6 or newer that starts is needed: install it or activate its environment"
[ -n "$from" ] || command -v curl >/dev/null || fail 1 "curl is needed: install it, or use --from-file"

id=$name${part:+-$part}
target=$to/$folder lock=$to/.$id.lock scratch=$to/.$id.unpack
partial=$to/$file.part whole=$to/$file.whole record=$to/$file.sha256
put() { case $next in *"$1"*) next=${next%%"$1"*}$2${next#*"$1"} ;; esac; }
closing() {  # prints the next command, ready to paste
    if [ "$to" -ef data ]; then next=${next%%\[*}; else put '[' ''; put ']' ''; fi
    case $next in *TARGET*) put TARGET "$(printf %q "$target")" ;; *) put TO "$(printf %q "$to")" ;; esac
    say "next: $next"
    case $next in */SET)
        say "where SET is one of: $(set +f; shopt -s nullglob; CDPATH='' cd "$target" && echo */)" ;;
    esac
}
done_already() {
    if [ -e "$target/.complete" ]; then
        say "$id is complete in $target; to fetch it again, delete that folder first"
        closing
        exit 0
    fi
}
done_already
[ ! -e "$target" ] || fail 3 \
    "$target exists, but was not finished by this script: move it away or delete it, then run this again"
algorithm=${hash%%:*} expected=${hash#*:}
if [ -z "$hash" ]; then
    algorithm=sha256
    if [ -e "$record" ]; then
        read -r expected _ <"$record" || true
        expected=$(tr A-F a-f <<<"$expected")
        case $expected in *[!0-9a-f]*) expected='' ;; esac
        [ ${#expected} -eq 64 ] || fail 3 \
            "$record does not begin with a sha256: correct it, or delete it to accept any archive; then run this again"
    fi
fi
say "$id, terms of use: $terms"

# Python runs isolated ("python3 -IS"), so that no module in the current folder shadows one of the standard library.
child='' owned='' made=()
run() {  # in the background: bash handles a signal only after a foreground command has ended
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
    local folder
    for folder in ${made[@]+"${made[@]}"}; do rmdir "$folder" 2>/dev/null || true; done  # fails if it holds anything
}
interrupted() { fail "$1" "interrupted; run the same command again to resume"; }
trap cleanup EXIT
trap 'interrupted 129' HUP
trap 'interrupted 130' INT
trap 'interrupted 143' TERM

stale() {  # a lock of another host is never stale: its processes are not visible from this host
    local host pid
    read -r host pid 2>/dev/null <"$lock/owner" && [ "$host" = "$HOSTNAME" ] || return 1
    ! kill -0 "$pid" 2>/dev/null && ! ps -p "$pid" >/dev/null 2>&1  # kill fails on other users' processes
}
take_lock() {
    if ! mkdir "$lock" 2>/dev/null; then
        [ -d "$lock" ] || fail 5 "cannot write in $to: check its permissions and free space, or choose another --to"
        # Of several processes that find a stale lock, one creates this folder; it checks again, as it may be late.
        if stale && mkdir "$lock/takeover" 2>/dev/null; then
            if stale; then owned=1; else rmdir "$lock/takeover"; fi
        fi
        [ -n "$owned" ] || fail 6 \
            "another download of $id into $to is running (host, process: $(cat "$lock/owner" 2>/dev/null))." \
            "Wait for it. If there is none, delete $lock and run this again."
    fi
    owned=1
    echo "$HOSTNAME $$" >"$lock/owner" || fail 5 "cannot write in $to: free space there, or choose another --to"
    rm -rf "$lock/takeover" "$lock/fetched" "$scratch"
}

check_space() {  # $1: bytes of the archive, $2: bytes of it already downloaded
    local missing=$(($1 - $2)) larger=${unpacked:-$1} free  # pictures do not shrink when packed
    free=$(python3 -IS -c 'import shutil, sys; print(shutil.disk_usage(sys.argv[1]).free)' "$to")
    [ "$free" -ge $((missing + larger)) ] || fail 5 \
        "$to has $(gb "$free") free, but $(gb $((missing + larger))) are needed:" \
        "$(gb "$missing") to download and $(gb "$larger") unpacked. Free some space, or choose another disk with --to."
}

kind="zip or tar archive"
[ -z "$hash" ] || kind=".${file##*.} file"
is_archive() {  # checks magic bytes; a .pth is a zip or, from older versions of torch.save, a pickle (protocol 2)
    case ${hash:+$file}:$(head -c 2 "$1" | od -An -tx1 | tr -d ' \n') in
        *.zip:504b | *.gz:1f8b | *.tgz:1f8b | *.pth:8002 | *.pth:504b | :504b | :1f8b) ;;
        :*) head -c 262 "$1" | tail -c 5 | grep -q ustar ;;
        *) return 1 ;;
    esac
}

why='' got=''
verify() {  # is $1 the archive of the table? If not, sets why.
    why="it is not a $kind, perhaps a web page saved under that name"
    is_archive "$1" || return 1
    run python3 -IS - "$1" "$algorithm" >"$lock/answer" <<'EOF' || fail 5 "$1: its hash cannot be computed; the file is kept"
import hashlib, sys
digest = hashlib.new(sys.argv[2], usedforsecurity=False)  # FIPS mode allows md5 only with this flag
with open(sys.argv[1], "rb") as f:
    for block in iter(lambda: f.read(1 << 20), b""):
        digest.update(block)
print(digest.hexdigest())
EOF
    got=$(cat "$lock/answer")
    why="wrong $algorithm: expected $expected${bytes:+ ($bytes bytes)}, got $got ($(size_of "$1") bytes)"
    [ -n "$hash" ] || why="its sha256 is $got, but $record says $expected (delete that record to accept this one)"
    [ -z "$expected" ] || [ "$got" = "$expected" ]
}

announced() {  # sets size to the Content-Length of $1, or to nothing
    size=''
    run curl -fsIL -g --retry 2 --proto '=http,https' --connect-timeout 20 --max-time 60 --url "$1" \
        >"$lock/answer" || return 0  # some servers refuse HEAD requests but send the file
    size=$(tr -d '\r' <"$lock/answer" | awk '
        /^HTTP\// { bytes = page = "" }  # headers so far were those of a redirect
        tolower($1) == "content-length:" { bytes = $2 }
        tolower($1) == "content-type:" { page = $2 ~ /^text\// }
        END { if (bytes ~ /^[1-9][0-9]*$/ && !page) print bytes }')
}

fetch() {  # downloads $1 to $whole, resuming from $partial; on failure returns 1 and sets why
    local size=$bytes into=$partial at_start before now most code http type attempt meter=-sS
    [ ! -t 2 ] || meter=-#
    [ -n "$size" ] || announced "$1"
    if [ -n "$size" ]; then
        [ "$(size_of "$partial")" -le "$size" ] || rm -f "$partial"  # part of another file
        check_space "$size" "$(size_of "$partial")"
    else
        into=$lock/fetched  # of unknown size, so a later run could not tell whether it is complete
    fi
    at_start=$(size_of "$into") now=$at_start most=$at_start
    say "fetching $file ($(gb "$size"), $(gb "$now") here) from $1"
    case ${hash:-$expected}$1 in
        http://*) say "note: no encryption and no published hash, so its authenticity cannot be verified" ;;
    esac
    for ((attempt = 0; attempt < tries && now != ${size:--1}; attempt++)); do
        run sleep $((attempt * pause))
        [ -n "$size" ] || { rm -f "$into"; now=0; }
        before=$now code=0 http='' type=''
        # Not curl's --retry: it discards the bytes of the failed try, even with -C -.
        run curl -fL -g "$meter" -C - -o "$into" -w '%{http_code} %{content_type}' --proto '=http,https' \
            --connect-timeout 20 --speed-limit 1000 --speed-time 60 --url "$1" >"$lock/answer" || code=$?
        read -r http type <"$lock/answer" || true
        now=$(size_of "$into")
        [ "$now" -le "$most" ] || most=$now attempt=0  # count only tries without progress
        why="incomplete, $now of ${size:-unknown} bytes (curl error $code)"
        case $code in
            1 | 3 | 60) return 1 ;;  # protocol, URL, certificate: retrying does not help
            22) why="HTTP error $http"
                case $http in 408 | 429 | 5??) continue ;; *) return 1 ;; esac ;;
            23) fail 5 "cannot write in $to: free space there, then run the same command again to resume" ;;
            33) why="it cannot resume and sent ${type:-something else}"
                case $type in text/*) return 1 ;; esac  # an error page must not delete the partial download
                rm -f "$into"; at_start=0 now=0 ;;
            *)  if [ "$now" -gt 0 ] && ! is_archive "$into"; then
                    why="it sent ${type:-something} instead of a $kind (a quota or error page?)"
                    rm -f "$into"
                    return 1
                fi
                if [ "$code" = 0 ] && [ -z "$size" ] && [ "$now" -gt 0 ]; then
                    size=$now
                elif [ "$code" = 0 ] && { [ "$now" = "$before" ] || [ "$now" -gt "$size" ]; }; then
                    why="its file ends after $now bytes, expected are ${size:-more}"
                    [ "$at_start" -gt 0 ] || rm -f "$into"
                    return 1
                fi ;;
        esac
    done
    [ "$now" = "$size" ] && mv -f "$into" "$whole"
}

unpack() {  # $1 -> scratch, then rename to target: a folder with .complete is complete
    local code=0 pending=''
    if [ -z "$expected" ]; then
        pending=$lock/record
        printf '%s  %s\n' "$got" "$file" >"$pending" ||
            fail 5 "cannot write in $to: free space there, then run the same command again"
    fi
    run python3 -IS - "$1" "$file" "$scratch" "$target" "$algorithm:$got" "${hash:+known}" "$pending" "$record" \
        <<'EOF' || code=$?
import errno, os, shutil, stat, struct, sys, tarfile, zipfile, zlib
path, file, scratch, target, digest, known, pending, record = sys.argv[1:]
to, needed = os.path.dirname(scratch), 0

def fail(code, message):
    print(f"download.sh: {message}", file=sys.stderr)
    sys.exit(code)

def admit(name, is_plain, size):
    global needed
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or ":" in parts[0] or ".." in parts or not is_plain:
        fail(3, f"{file} holds {name!r}, a link or a path outside its folder: not unpacked")
    needed += -(-size // 4096) * 4096

def check_space():
    free = shutil.disk_usage(to).free
    if free < needed:
        fail(5, f"{to} has {free / 1e9:.2f} GB free, {file} needs {needed / 1e9:.2f} GB unpacked")

top = os.path.join(scratch, os.path.basename(target))
try:
    os.makedirs(scratch)
    with open(path, "rb") as f:
        is_zip = f.read(2) == b"PK"
    if file.endswith(".pth"):
        admit(file, True, os.path.getsize(path))
        check_space()
        os.makedirs(top)
        shutil.copyfile(path, os.path.join(top, file))
    elif is_zip:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                is_plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
                admit(info.filename, is_plain, info.file_size)
            check_space()
            archive.extractall(scratch)
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                admit(member.name, member.isfile() or member.isdir(), member.size)
            if not known:  # tarfile takes an unreadable header for the end and skips gzip's checksum
                archive.fileobj.seek(archive.offset)
                if any(archive.fileobj.read(512) or b"?"):
                    raise tarfile.ReadError("no end-of-archive mark")
                while archive.fileobj.read(1 << 20):
                    pass
            check_space()
            # Python before 3.10.12 has no extraction filters; `admit` has checked the paths anyway.
            archive.extractall(scratch, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    if not known:
        shutil.rmtree(os.path.join(scratch, "__MACOSX"), ignore_errors=True)
        names = [name for name in os.listdir(scratch) if name != ".DS_Store"]
        if not names:
            fail(3, f"{file} is empty")
        only = os.path.join(scratch, names[0])
        top = only if len(names) == 1 and os.path.isdir(only) else scratch
    if not os.path.isdir(top):
        fail(3, f"{file} holds no folder {os.path.basename(target)}")
    if target.endswith("_lmdb") and not os.path.isfile(os.path.join(top, "data.mdb")):  # which --dataset lsun reads
        fail(3, f"{file} holds no data.mdb, so it is not an LSUN data set")
    with open(os.path.join(top, ".complete"), "w") as f:
        f.write(f"{file} {digest}\n")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if pending:
        os.replace(pending, record)
    os.rename(top, target)
except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, struct.error,
        LookupError, RuntimeError, ValueError) as error:  # the last three: from zipfile at invalid or encrypted members
    fail(3, f"{file} is damaged ({error})")
except OSError as error:
    if error.errno in (None, errno.EINVAL):  # errors of gzip; a seek beyond the end of the file
        fail(3, f"{file} is damaged ({error})")
    fail(5, f"cannot unpack {file}: {error}")
EOF
    case $code in
        0) return ;;
        3)  if [ -n "$from" ]; then
                fail 3 "Take another copy for --from-file, from ${urls%% *} for instance."
            elif [ -n "$hash" ]; then
                fail 3 "It is kept as $1. Its hash is correct, so another download would not help: please report it."
            fi
            rm -f "$1"
            fail 3 "It was deleted. Run the same command again to fetch it. If that does not help, give another" \
                "copy with --mirror URL, or with --from-file FILE (from ${urls%% *} in a browser)." ;;
        5)  fail 5 "Free space in $to and run the same command again: the archive is kept. Or unpack it elsewhere:" \
                "bash download.sh $name${part:+ $part} --from-file $(printf %q "$1") --to DIR" ;;
        *) fail 1 "unpacking was interrupted: run the same command again" ;;
    esac
}

missing=$to
while [ ! -e "$missing" ]; do made+=("$missing") missing=$(dirname "$missing"); done
mkdir -p "$to" 2>/dev/null || fail 5 "--to $to: cannot create this folder; choose another one"
take_lock
done_already
archive=$from
if [ -n "$from" ]; then
    verify "$from" || fail 3 "--from-file $from: $why." "Download $file again, from ${urls%% *} for instance."
elif [ -f "$whole" ]; then  # an earlier run downloaded it but could not unpack it
    if verify "$whole"; then archive=$whole; else say "$whole is removed: $why" >&2; rm -f "$whole"; fi
fi
for url in $mirror $urls; do
    [ -z "$archive" ] || break
    if fetch "$url"; then
        if verify "$whole"; then archive=$whole; break; fi
        [ -z "$hash" ] || rm -f "$whole"
    fi
    say "$url: $why" >&2
done
if [ -z "$archive" ]; then
    [ ! -f "$whole" ] || fail 3 \
        "The download is kept as $whole: to accept it, delete $record" \
        "and run the same command again. Or give another copy with --mirror URL or --from-file FILE."
    fail 3 "no source gave $file. Run the same command again later (it resumes), or add --mirror URL, or" \
        "download it in a browser, from ${urls%% *} for instance, and add --from-file FILE." \
        ${elsewhere:+"$elsewhere"}
fi
if [ -n "$hash" ]; then
    say "hash is right; unpacking into $target"
elif [ -n "$expected" ]; then
    say "sha256 $got, as in $record; unpacking into $target"
else
    say "sha256 $got; none is published, so it is stored in $record to check later downloads" "unpacking into $target"
fi
unpack "$archive"
for leftover in "$partial" "$whole"; do  # but not the file of --from-file
    [ "$leftover" -ef "$from" ] || rm -f "$leftover"
done
say "$id is ready in $target"
closing
