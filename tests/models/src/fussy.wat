;; Answers a request with itself, unless a sign in it asks for something else:
;;   !   it traps           ~   an answer that is not JSON
;;   %   it never ends      #3  it computes for a while first, 3 times as long as #1
(module
  (memory (export "memory") 1)
  (global $turns (mut i64) (i64.const 0))

  (func (export "alloc") (param $length i32) (result i32)
    (local $missing i32)
    (local.set $missing
      (i32.sub
        (i32.add (i32.shr_u (i32.add (local.get $length) (i32.const 1024)) (i32.const 16)) (i32.const 1))
        (memory.size)))
    (if (i32.gt_s (local.get $missing) (i32.const 0))
      (then (if (i32.eq (memory.grow (local.get $missing)) (i32.const -1)) (then (unreachable)))))
    (i32.const 1024))

  (func $compute (param $left i64)
    (loop $again
      (global.set $turns (i64.add (global.get $turns) (i64.const 1)))
      (local.set $left (i64.sub (local.get $left) (i64.const 1)))
      (br_if $again (i64.ne (local.get $left) (i64.const 0)))))

  (func $answer (param $at i32) (param $length i32) (result i64)
    (i64.or
      (i64.shl (i64.extend_i32_u (local.get $at)) (i64.const 32))
      (i64.extend_i32_u (local.get $length))))

  (func (export "execute") (param $start i32) (param $length i32) (result i64)
    (local $at i32) (local $end i32) (local $sign i32)
    (local.set $at (local.get $start))
    (local.set $end (i32.add (local.get $start) (local.get $length)))
    (block $read
      (loop $next
        (br_if $read (i32.ge_u (local.get $at) (local.get $end)))
        (local.set $sign (i32.load8_u (local.get $at)))
        (if (i32.eq (local.get $sign) (i32.const 33)) (then (unreachable)))
        (if (i32.eq (local.get $sign) (i32.const 37)) (then (call $compute (i64.const 0))))
        (if (i32.eq (local.get $sign) (i32.const 126))
          (then (return (call $answer (local.get $at) (i32.const 1)))))
        (if (i32.eq (local.get $sign) (i32.const 35))
          (then
            (call $compute
              (i64.mul
                (i64.extend_i32_u (i32.sub (i32.load8_u (i32.add (local.get $at) (i32.const 1))) (i32.const 48)))
                (i64.const 100000000)))))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br $next)))
    (call $answer (local.get $start) (local.get $length))))
