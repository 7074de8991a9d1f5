#!/bin/sh
# usage: build.sh OUTDIR
# needs: apt-get install --no-install-recommends clang-19 lld-19 wasi-libc libclang-rt-19-dev-wasm32   (Debian 12+)
# Compile and link are separate steps on purpose: the clang driver's link step runs any wasm-opt it finds on PATH
# (bytes differ from machine to machine) and clang 19's --no-wasm-opt drops the link job (exit 0, no file).
set -e; cd "$(dirname "$0")"; OUT=$1; mkdir -p "$OUT"; V=${LLVM_V:-19}; L=/usr/lib/wasm32-wasi
RT=$(clang-$V -print-resource-dir)/lib/wasi/libclang_rt.builtins-wasm32.a
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
for m in json_model cpu_model mem_model spin_model trap_model; do
  clang-$V --target=wasm32 -mcpu=mvp -mbulk-memory -msign-ext -mnontrapping-fptoint -mmutable-globals -O2 -ffreestanding -c src/$m.c -o $T/$m.o
  wasm-ld-$V -s --no-entry $T/$m.o -o "$OUT/$m.wasm"
done
for m in wasi_cmd wasi_work wasi_reactor; do
  clang-$V --target=wasm32-wasi -O2 -c src/$m.c -o $T/$m.o
  case $m in *reactor) X="--entry _initialize $L/crt1-reactor.o";; *) X=$L/crt1-command.o;; esac
  wasm-ld-$V -s $X $T/$m.o -L$L -lc $RT -o "$OUT/$m.wasm"
done
