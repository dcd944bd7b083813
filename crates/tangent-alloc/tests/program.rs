//! What the settings promise, in a program without the test harness, whose threads would precede them.

#[global_allocator]
static ALLOCATOR: tangent_alloc::Allocator = tangent_alloc::Allocator;

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn main() {
    const SIZE: usize = 128 << 20;
    tangent_alloc::keep_memory();
    // SAFETY: the call takes nothing.
    let heap = || unsafe { libc::mallinfo2() };
    let before = heap();
    for place in ["this thread", "another thread"] {
        let block = move || vec![1u8; SIZE];
        let block = match place {
            "this thread" => block(),
            _ => std::thread::spawn(block).join().expect("a thread ends"),
        };
        let with_block = heap();
        assert!(
            with_block.uordblks >= before.uordblks + SIZE,
            "{place}: the heap has the block"
        );
        assert_eq!(with_block.hblks, 0, "{place}: nothing is beside the heap");
        drop(block);
        assert!(
            heap().fordblks >= SIZE,
            "{place}: the heap keeps what is free"
        );
    }
    tangent_alloc::give_back();
    assert!(heap().arena < SIZE, "the heap's end is given back");
    assert!(vec![0u8; SIZE].iter().all(|&byte| byte == 0));
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn main() {}
