"""Two small modules of our own around a Neuron package, which make a request one crossing between host and guest.

A callback into Python costs microseconds, and a package copies memory through an import thousands of times a request.
So that import is a function of WASM: the instance `STUBS` is made before the package and exports what the package
imports, the instance `DRIVER` is made after it and puts into the table of the first what needs the package's memory.
The driver also carries a request through: it frees the answer before, computes, and returns place and length at once.

The bytes are what wat2wasm makes of the text; a test compares them. So compiling a model needs no assembler.
"""

#: Exports what packages import and what is too hot for a callback. `copy_back` is for builds that want the target back.
STUBS_TEXT = """
(module $"spark bridge"
  (type $copy (func (param i32 i32 i32)))
  (table $later (export "table") 1 funcref)
  (func (export "copy") (param $to i32) (param $from i32) (param $count i32)
    (call_indirect $later (type $copy)
      (local.get $to) (local.get $from) (local.get $count) (i32.const 0)))
  (func (export "copy_back") (param $to i32) (param $from i32) (param $count i32) (result i32)
    (call_indirect $later (type $copy)
      (local.get $to) (local.get $from) (local.get $count) (i32.const 0))
    (local.get $to)))
"""

#: Imports, in this order: the package's memory, malloc, free and node_calc_v3, and the table of the stubs.
#: `begin` takes the workbook; `malloc` gives a buffer for a request, in place of the one before, or 0; `node_calc_v3`
#: computes the request of that length in the buffer and returns ``place << 32 | length`` of the answer, which stays
#: until the next. They have the names of what they lead to, because these are what failures tell.
DRIVER_TEXT = """
(module $"spark bridge"
  (import "package" "memory" (memory 0))
  (import "package" "malloc" (func $malloc (param i32) (result i32)))
  (import "package" "free" (func $free (param i32)))
  (import "package" "node_calc_v3" (func $calc (param i32 i32 i32 i32) (result i32)))
  (import "stubs" "table" (table $later 1 funcref))
  (global $workbook (mut i32) (i32.const 0))
  (global $request (mut i32) (i32.const 0))
  (global $length (mut i32) (i32.const 0))
  (global $answer (mut i32) (i32.const 0))
  (elem (table $later) (i32.const 0) func $copy)
  (func $copy (param $to i32) (param $from i32) (param $count i32)
    (memory.copy (local.get $to) (local.get $from) (local.get $count)))
  (func (export "begin") (param i32) (result i32)
    (global.set $workbook (local.get 0))
    (global.set $length (call $malloc (i32.const 8)))
    (global.get $length))
  (func (export "malloc") (param $count i32) (result i32)
    (if (global.get $request) (then (call $free (global.get $request))))
    (global.set $request (call $malloc (local.get $count)))
    (global.get $request))
  (func (export "node_calc_v3") (param $count i32) (result i64)
    (if (global.get $answer)
      (then
        (call $free (global.get $answer))
        (global.set $answer (i32.const 0))))
    (global.set $answer
      (call $calc (global.get $workbook) (global.get $request) (local.get $count) (global.get $length)))
    (i64.or
      (i64.shl (i64.extend_i32_u (global.get $answer)) (i64.const 32))
      (i64.load32_u (global.get $length)))))
"""

STUBS = bytes.fromhex(
    """
    0061736d01000000010e0260037f7f7f0060037f7f7f017f0303020001040401700001071c03057461626c65010004636f7079000009636f
    70795f6261636b00010a1f020d0020002001200241001100000b0f00200020012002410011000020000b0050046e616d65000d0c73706172
    6b2062726964676502270200030002746f010466726f6d0205636f756e7401030002746f010466726f6d0205636f756e740407010004636f
    707905080100056c61746572
    """
)

DRIVER = bytes.fromhex(
    """
    0061736d01000000011d0560017f017f60017f0060047f7f7f7f017f60037f7f7f0060017f017e025a05077061636b616765066d656d6f72
    79020000077061636b616765066d616c6c6f630000077061636b61676504667265650001077061636b6167650c6e6f64655f63616c635f76
    330002057374756273057461626c6501700001030504030000040615047f0141000b7f0141000b7f0141000b7f0141000b07210305626567
    696e0004066d616c6c6f6300050c6e6f64655f63616c635f76330006090901020041000b0001030a59040c00200020012002fc0a00000b0e
    002000240041081000240223020b130023010440230110010b20001000240123010b27002303044023031001410024030b23002301200023
    02100224032303ad4220862302350200840b008901046e616d65000d0c737061726b20627269646765011b0400066d616c6c6f6301046672
    6565020463616c630304636f707902260303030002746f010466726f6d0205636f756e7405010005636f756e7406010005636f756e740508
    0100056c617465720724040008776f726b626f6f6b01077265717565737402066c656e6774680306616e73776572
    """
)
