//! The allocator of the program and of the benches: memory is kept between steps, and large buffers
//! lie close together.
//!
//! Buffers of up to tens of megabytes come and go every step. Giving them back to the system and
//! faulting them in again costs a fifth of the step, so nothing is given back during a run. mimalloc is
//! fast with small blocks from many threads, but sorts large ones by size into chunks of 32 MiB, and
//! what a chunk has free serves no other size: a run takes up to a seventh more memory, and not the same
//! twice. So glibc takes the large ones: it has one heap, gives the smallest free piece that is large
//! enough, and joins free neighbors. Where there is no glibc, mimalloc takes all, as it does blocks that
//! must begin at more than two lines of the processor's cache.

use std::alloc::{GlobalAlloc, Layout, System};

use mimalloc::MiMalloc;

/// Blocks from this many bytes on are large.
const LARGE: usize = 16 << 10;

/// Large blocks begin at multiples of this: two lines of the processor's cache, as matrix products and
/// decompositions ask for.
const ALIGNMENT: usize = 128;

/// The system is asked for this alignment, which its `malloc` has anyway on 64-bit machines.
const WORD_PAIR: usize = 16;

/// The program's allocator; see the [crate's](crate) documentation.
///
/// ```ignore
/// #[global_allocator]
/// static ALLOCATOR: tangent_alloc::Allocator = tangent_alloc::Allocator;
/// ```
pub struct Allocator;

/// Sets both allocators never to give memory back by themselves, for the whole process and what C
/// libraries take in it. To be called first in `main`, before there are other threads.
pub fn keep_memory() {
    /// mimalloc's `mi_option_purge_delay`; the bindings leave its number out.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    // Where the table of options has another length, the number may be another one, too.
    const _: () = assert!(libmimalloc_sys::_mi_option_last == 47);
    // SAFETY: options are plain integers, set before any other thread exists.
    unsafe {
        libmimalloc_sys::mi_option_set(PURGE_DELAY, -1);
    }
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: plain integers, which glibc and the system set under locks of their own.
    unsafe {
        // Huge pages are cleared whole where a block touches a part of one: launches take longer.
        libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0);
        // One heap for all threads, no block beside it, and its end is not cut off by itself.
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
    }
}

/// Gives back to the system what is free in glibc's heap now. For after work that does not come again,
/// such as reading a model and rows: a small run never needs that much room.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: only pages without a block in them are given back.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// What is asked of the system for a block of this layout: [`ALIGNMENT`] bytes more, in which the
/// block begins where it should. `None` if mimalloc takes it.
///
/// Asking for the alignment itself would not do: glibc then looks for a piece that is larger by more
/// than that, and does not find the one that a block of the same size has just left.
fn asked(block: Layout) -> Option<Layout> {
    let has_glibc = cfg!(all(target_os = "linux", target_env = "gnu"));
    if !has_glibc || block.size() < LARGE || block.align() > ALIGNMENT {
        return None;
    }
    Layout::from_size_align(block.size().checked_add(ALIGNMENT)?, WORD_PAIR).ok()
}

/// The block within what the system gave. Where that begins stands before the block.
///
/// # Safety
/// `given` is null, or a block of the layout that [`asked`] gives, aligned to [`WORD_PAIR`].
unsafe fn block_within(given: *mut u8) -> *mut u8 {
    if given.is_null() {
        return given;
    }
    let before = ALIGNMENT - given.addr() % ALIGNMENT;
    // SAFETY: 16 to 128 bytes, all of them asked for beside the block; a pointer fits before it, where
    // it is aligned.
    unsafe {
        let block = given.add(before);
        block.cast::<*mut u8>().sub(1).write(given);
        block
    }
}

// SAFETY: a block's layout alone says who takes it, at its end as at its beginning. mimalloc keeps the
// contract for its own; the others begin at a multiple of `ALIGNMENT`, within blocks of the
// system's that are larger by it, and `block_within` noted where those begin.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, block: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that either wants.
        unsafe {
            match asked(block) {
                Some(larger) => block_within(System.alloc(larger)),
                None => MiMalloc.alloc(block),
            }
        }
    }

    unsafe fn alloc_zeroed(&self, block: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`; the note of where it begins is outside of the block.
        unsafe {
            match asked(block) {
                Some(larger) => block_within(System.alloc_zeroed(larger)),
                None => MiMalloc.alloc_zeroed(block),
            }
        }
    }

    unsafe fn dealloc(&self, start: *mut u8, block: Layout) {
        // SAFETY: the block was given for this layout, so what was asked for it is the same again.
        unsafe {
            match asked(block) {
                Some(larger) => System.dealloc(start.cast::<*mut u8>().sub(1).read(), larger),
                None => MiMalloc.dealloc(start, block),
            }
        }
    }

    unsafe fn realloc(&self, start: *mut u8, block: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that this size is one of a layout; both blocks are as large as
        // what is copied, and the new one overlaps nothing.
        unsafe {
            let wanted = Layout::from_size_align_unchecked(size, block.align());
            if asked(block).is_none() && asked(wanted).is_none() {
                return MiMalloc.realloc(start, block, size);
            }
            let moved = self.alloc(wanted);
            if !moved.is_null() {
                start.copy_to_nonoverlapping(moved, usize::min(block.size(), size));
                self.dealloc(start, block);
            }
            moved
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[global_allocator]
    static ALLOCATOR: Allocator = Allocator;

    /// Sizes around what is large.
    const SIZES: [usize; 5] = [1, LARGE - 1, LARGE, LARGE + 1, 5 << 20];

    /// A block whose bytes count up.
    fn filled(layout: Layout) -> *mut u8 {
        // SAFETY: no size is 0, and all bytes are the block's.
        unsafe {
            let start = ALLOCATOR.alloc(layout);
            assert!(!start.is_null(), "{layout:?}");
            assert_eq!(start.addr() % layout.align(), 0, "{layout:?}");
            for index in 0..layout.size() {
                start.add(index).write(index as u8);
            }
            start
        }
    }

    fn check(start: *const u8, size: usize) {
        // SAFETY: the caller's block has so many bytes.
        let bytes = unsafe { std::slice::from_raw_parts(start, size) };
        let mut counted = bytes.iter().enumerate();
        assert!(counted.all(|(index, &byte)| byte == index as u8));
    }

    #[test]
    fn blocks_keep_what_is_written_while_they_grow_and_shrink() {
        for align in [1, 8, 64, 4096] {
            for (old, new) in SIZES.iter().flat_map(|old| SIZES.map(|new| (*old, new))) {
                let layout = Layout::from_size_align(old, align).unwrap();
                let neighbor = filled(layout);
                let start = filled(layout);
                // SAFETY: blocks of this layout, each given back once as what it has become.
                unsafe {
                    let moved = ALLOCATOR.realloc(start, layout, new);
                    assert_eq!(moved.addr() % align, 0);
                    check(moved, usize::min(old, new));
                    check(neighbor, old);
                    ALLOCATOR.dealloc(moved, Layout::from_size_align(new, align).unwrap());
                    ALLOCATOR.dealloc(neighbor, layout);
                }
            }
        }
    }

    #[test]
    fn zeroed_blocks_are_zero_where_others_were() {
        for size in SIZES {
            let layout = Layout::from_size_align(size, 4).unwrap();
            let before = filled(layout);
            // SAFETY: one block after another of this layout.
            unsafe {
                ALLOCATOR.dealloc(before, layout);
                let start = ALLOCATOR.alloc_zeroed(layout);
                let bytes = std::slice::from_raw_parts(start, size);
                assert!(bytes.iter().all(|&byte| byte == 0));
                ALLOCATOR.dealloc(start, layout);
            }
        }
    }

    #[test]
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn large_blocks_are_aligned() {
        for size in [LARGE, LARGE + 1, LARGE + 17, 3 << 20] {
            let layout = Layout::from_size_align(size, 4).unwrap();
            let start = filled(layout);
            assert_eq!(start.addr() % ALIGNMENT, 0);
            // SAFETY: a block of this layout.
            unsafe { ALLOCATOR.dealloc(start, layout) };
        }
    }

    /// Sizes that nobody has: too large to ask for [`ALIGNMENT`] bytes more, and not.
    const TOO_LARGE: [usize; 2] = [isize::MAX as usize - ALIGNMENT, isize::MAX as usize / 2];

    #[test]
    fn a_size_that_nobody_has_is_refused() {
        for most in TOO_LARGE {
            let layout = Layout::from_size_align(most, 8).unwrap();
            // SAFETY: its size is not 0.
            unsafe {
                assert!(ALLOCATOR.alloc(layout).is_null());
                assert!(ALLOCATOR.alloc_zeroed(layout).is_null());
            }
            for size in [10, LARGE + 10] {
                let layout = Layout::from_size_align(size, 8).unwrap();
                let start = filled(layout);
                // SAFETY: a block of this layout, which stays what it was.
                unsafe {
                    assert!(ALLOCATOR.realloc(start, layout, most).is_null());
                    check(start, size);
                    ALLOCATOR.dealloc(start, layout);
                }
            }
        }
    }
}
