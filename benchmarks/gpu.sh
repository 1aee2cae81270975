#!/usr/bin/env bash
# What is to be known of a GPU in ten minutes: stages in order of value, each with a time limit of its own. A stage that
# fails or runs out of time stops no other; what it wrote is kept. Nothing is downloaded.
#
#   PYTHON=python3.12 benchmarks/gpu.sh wheels      beforehand, where there is a network: wheels/ of all but JAX
#   DATA=../shared/data benchmarks/gpu.sh           there: on a machine with a GPU, its JAX and that Python
#   DRY=1 benchmarks/gpu.sh                         every stage in tiny sizes on whatever is here
#
# OUT (runs/gpu) has STAGE.log and STAGE.json for every stage: exit status (124: out of time), seconds, limit; written as
# soon as it ends. Results of a stage itself are beside them, and the programs that were compiled, for a second try.
# STAGES="a d" chooses some, TOTAL is the limit of all in seconds (600; 6000 with DRY). The exit status is 1 if a
# stage but e failed, 2 for a word that is not known. Hours of a GPU: benchmarks/gpu_all.sh.
set -uo pipefail
cd "$(dirname "$0")/.."
DRY=${DRY:-} OUT=${OUT:-runs/gpu} DATA=${DATA:-../shared/data} STAGES=${STAGES:-a b c d e f} PYTHON=${PYTHON:-python3}
TOTAL=${TOTAL:-${DRY:+6000}} TOTAL=${TOTAL:-600}
WANTED="flax optax orbax-checkpoint safetensors pydantic jaxtyping rich lazy-loader scipy numpy tensorflow-datasets array-record
importlib-resources opencv-python-headless pillow scikit-learn tensorboardX jinja2 resvg_py matplotlib onnx fastapi uvicorn
httptools uvloop grpcio protobuf prometheus-client pytest hypothesis beartype"

refuse() {
  echo "$1" >&2
  exit 2
}

case "$#${1:-}" in
  0) ;;
  1wheels)
    $PYTHON -m pip wheel --quiet --wheel-dir wheels --constraint constraints.txt $WANTED || exit
    rm -f wheels/jax-* wheels/jaxlib-* wheels/nvidia_* # the machine has its own
    du -sh wheels
    exit ;;
  *) refuse "gpu.sh: expected no argument, or wheels, got $*" ;;
esac
for letter in $STAGES; do
  case $letter in [a-f]) ;; *) refuse "STAGES: expected letters from a to f with spaces between them, got $STAGES" ;; esac
done
$PYTHON --version || refuse "PYTHON: expected a Python that runs, got $PYTHON"

mkdir -p "$OUT"
export PYTHONPATH=$PWD XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=3
[ -n "$DRY" ] || export JAX_COMPILATION_CACHE_DIR=$(realpath "$OUT")/programs # stages and a second try share what they compile
BEGAN=$SECONDS FAILED=0

stage() { # stage LETTER NAME LIMIT COMMAND...: run it for at most LIMIT seconds, and write down at once how it ended
  local letter=$1 name=$2 limit=$3 left=$((TOTAL - (SECONDS - BEGAN))) began=$SECONDS status=0
  shift 3
  case " $STAGES " in *" $letter "*) ;; *) return ;; esac
  [ -z "$DRY" ] || limit=$((15 * limit)) # whatever is here may be slow, and busy
  limit=$((limit < left ? limit : left))
  if [ "$limit" -lt 5 ]; then
    status=124 limit=0
    echo "no time was left" >"$OUT/$name.log"
  else
    timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
  fi
  printf '{"stage": "%s", "name": "%s", "status": %d, "seconds": %d, "limit": %d}\n' \
    "$letter" "$name" "$status" $((SECONDS - began)) "$limit" >"$OUT/$name.json"
  cat "$OUT/$name.json"
  [ "$status" = 0 ] || [ "$letter" = e ] || FAILED=1 # e gets what time is left
}

install() { # what is missing, from wheels/, all at once; JAX is the machine's
  [ -d wheels ] || return 0
  local missing
  missing=$($PYTHON -c '
import importlib.metadata, pathlib, sys
there = {(d.name or "").lower().replace("-", "_").replace(".", "_") for d in importlib.metadata.distributions()}
print(*(w for w in sys.argv[1:] if pathlib.Path(w).name.split("-")[0].lower().replace(".", "_") not in there))
' wheels/*.whl) || return
  [ -z "$missing" ] || $PYTHON -m pip install --quiet --no-index --no-deps --no-compile $missing
}

train() { # train CONFIG EPOCHS OUT
  $PYTHON -m train.base --config "configs/$1.toml" --out "$3/base" "${SOURCE[@]}" --base.training.epochs "$2" "${TINY[@]}"
}

certify() { # certify CONFIG OUT: caches in float32 and bfloat16, and what they do on the test split; a study of its own
  $PYTHON -m train.caches --config "configs/$1.toml" --out "$2/caches" --ledger "$2/looks.json" "${SOURCE[@]}" \
    --base.weights "$2/base/base.safetensors" --plan.backend xla --plan.bfloat16 true "${TINY[@]}" "${TINY_FIT[@]}" &&
    $PYTHON -m train.evaluate --bundle "$2/caches/bundle" --out "$2/eval" --ledger "$2/looks.json" --timed "$TIMED"
}

network() { # network CONFIG EPOCHS OUT: all of a further network
  train "$1" "$2" "$3" && certify "$1" "$3" &&
    $PYTHON -m benchmarks.drivers --bundle "$3/caches/bundle" --batches $SOME --rounds 9 --out "$3/drivers.json"
}
export -f install train certify network

SOURCE=(--data.dir "$DATA/tfds") TINY=() TINY_FIT=() TIMED=150 SOME="1 256" CONFIG=cifar10_resnet18 EPOCHS=40
BATCHES="1 64 256 8 1024" ROUNDS=21 MEASURE=90 LOAD=3 NETWORK=resnet18 INPUT="32 32 3" CAPTURED=64
TESTS=(tests/runtime/test_branches.py tests/profiling/test_compiler.py tests/runtime/test_lowering.py)
if [ -n "$DRY" ]; then
  CONFIG=digits EPOCHS=1 TIMED=2 SOME=2 BATCHES="1 4" ROUNDS=3 MEASURE=1700 LOAD=1.5 NETWORK=resnet20 INPUT="8 8 1" CAPTURED=4
  SOURCE=() TESTS=(tests/profiling/test_compiler.py -k what_)
  SECOND=digits SECOND_EPOCHS=1
  TINY=(--base.accept-low-accuracy true --data.splits.fit "all[:256]" --data.splits.select "all[897:961]"
    --data.splits.certify "all[1197:1261]" --data.splits.test "all[1497:1561]")
  TINY_FIT=(--fit.epochs 1 --plan.epsilon 0.9 --plan.max-sites 1 --measure-rounds 3)
fi
# Functions run under timeout, in a shell of their own, to which arrays do not go.
HERE="$(declare -p OUT PYTHON SOURCE TINY TINY_FIT TIMED SOME); "

stage "${STAGES%% *}" install 60 bash -c "$HERE install" # counts as part of the first stage
XLA_FLAGS= JAX_DEFAULT_MATMUL_PRECISION=highest stage a tests 100 $PYTHON -m pytest -q -p no:cacheprovider -m gpu "${TESTS[@]}"
stage b train 110 bash -c "$HERE train $CONFIG $EPOCHS $OUT/$CONFIG"
stage c certify 110 bash -c "$HERE certify $CONFIG $OUT/$CONFIG"
stage d drivers 120 $PYTHON -m benchmarks.drivers --bundle "$OUT/$CONFIG/caches/bundle" --data-dir "$DATA/tfds" \
  --batches $BATCHES --rounds "$ROUNDS" --seconds "$MEASURE" --out "$OUT/measured-drivers.json"
stage d captured 40 $PYTHON -m benchmarks.captured --network "$NETWORK" --input $INPUT --batch "$CAPTURED" \
  --out "$OUT/measured-captured.json"
stage f serving 60 $PYTHON -m benchmarks.serving --bundle "$OUT/$CONFIG/caches/bundle" --seconds "$LOAD" --rounds 1 \
  --shares 0.8 1.6 --images 200 --contenders full cascade --out "$OUT/measured-serving.json"
stage e second 600 bash -c "$HERE network ${SECOND:-cifar10_resnet50} ${SECOND_EPOCHS:-12} $OUT/second"
exit "$FAILED"
