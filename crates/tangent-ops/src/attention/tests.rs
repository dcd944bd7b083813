//! Tests of attention: against its definition, over trees of segments, to the bit.

use super::block::BLOCK_ROWS;
use super::*;
use crate::Segment;
use crate::check::{self, Case};

fn rotary() -> Arc<Rotary> {
    Arc::new(Rotary::new(vec![1.0, 0.3], 400))
}

fn shape(window: Option<usize>) -> AttentionShape {
    AttentionShape {
        heads: 4,
        kv_heads: 2,
        head_dim: 4,
        window,
    }
}

fn attention_of(
    t: &[Tensor<2>],
    segments: &Arc<Segments>,
    rotary: &Arc<Rotary>,
    window: Option<usize>,
) -> Tensor<2> {
    let [q, k, v] = [t[0].clone(), t[1].clone(), t[2].clone()];
    attention(q, k, v, segments, rotary, shape(window))
}

fn definition_of(
    t: &[Tensor<2>],
    segments: &Segments,
    rotary: &Rotary,
    window: Option<usize>,
) -> Tensor<2> {
    let [q, k, v] = [t[0].clone(), t[1].clone(), t[2].clone()];
    definition(q, k, v, segments, rotary, shape(window))
}

fn forest() -> Segments {
    let segment = |start, len, parent| Segment { start, len, parent };
    Segments::new(vec![
        segment(0, 3, None),
        segment(3, 2, Some(0)),
        segment(5, 1, Some(0)),
        segment(6, 2, Some(2)),
        segment(8, 4, None),
    ])
}

#[test]
fn kernel_equals_definition_and_differences() {
    for (segments, window) in [
        (Segments::rows(&[5, 1, 3]), None),
        (Segments::rows(&[9, 2]), Some(3)),
        (forest(), None),
        (forest(), Some(2)),
    ] {
        let (n, segments, rotary) = (segments.tokens(), Arc::new(segments), rotary());
        check::operation(Case {
            shapes: &[(n, 16), (n, 8), (n, 8)],
            fused: |t| attention_of(t, &segments, &rotary, window),
            definition: |t| definition_of(t, &segments, &rotary, window),
        });
    }
}

#[test]
fn long_rows_equal_definition_across_blocks() {
    let long = 2 * BLOCK_ROWS + 7;
    let child = |start, len, parent| Segment { start, len, parent };
    // A long row beside a short one, and a long continuation of a long beginning.
    let rows = Segments::rows(&[long, 3]);
    let tree = vec![
        child(0, long, None),
        child(long, 5, Some(0)),
        child(long + 5, long, Some(0)),
    ];
    for (segments, window) in [
        (rows.clone(), None),
        (rows, Some(BLOCK_ROWS / 2)),
        (Segments::new(tree.clone()), None),
        (Segments::new(tree), Some(BLOCK_ROWS / 2)),
    ] {
        let (n, rotary) = (segments.tokens(), rotary());
        let segments = Arc::new(segments);
        check::equal(Case {
            shapes: &[(n, 16), (n, 8), (n, 8)],
            fused: |t| attention_of(t, &segments, &rotary, window),
            definition: |t| definition_of(t, &segments, &rotary, window),
        });
    }
}

#[test]
fn parts_of_many_branches_are_added_in_chunks() {
    // Many short branches of a long beginning see far more tokens than there are.
    let mut list = vec![Segment {
        start: 0,
        len: 40,
        parent: None,
    }];
    list.extend((0..30).map(|i| Segment {
        start: 40 + i,
        len: 1,
        parent: Some(0),
    }));
    let (segments, rotary) = (Arc::new(Segments::new(list)), rotary());
    let op = Attention {
        segments: segments.clone(),
        rotary: rotary.clone(),
        shape: shape(None),
    };
    assert!(op.chunks().len() > 3, "{:?}", op.chunks());
    check::equal(Case {
        shapes: &[(70, 16), (70, 8), (70, 8)],
        fused: |t| attention_of(t, &segments, &rotary, None),
        definition: |t| definition_of(t, &segments, &rotary, None),
    });
}

#[test]
fn threads_change_no_bit() {
    let segment = |start, len, parent| Segment { start, len, parent };
    // Rows of several blocks of queries, of which two share their beginning.
    let segments = Arc::new(Segments::new(vec![
        segment(0, 120, None),
        segment(120, 60, Some(0)),
        segment(180, 70, Some(0)),
        segment(250, 100, None),
    ]));
    let rotary = rotary();
    for window in [None, Some(50)] {
        check::same_in_every_pool(&[(350, 16), (350, 8), (350, 8)], |t| {
            attention_of(t, &segments, &rotary, window)
        });
    }
}

#[test]
fn a_token_has_the_same_bits_however_its_row_is_cut() {
    // Beginnings that end where blocks do not, single tokens, and sums of more than 512 terms.
    for lengths in [
        vec![1],
        vec![40, 1, 2, 700, 3],
        vec![1100, 1, 77],
        vec![5, 1, 1, 1],
    ] {
        let n: usize = lengths.iter().sum();
        let mut list: Vec<Segment> = vec![];
        for len in lengths {
            let start = list.last().map_or(0, |s| s.start + s.len);
            let parent = list.len().checked_sub(1);
            list.push(Segment { start, len, parent });
        }
        // Another row continues the first segment.
        let first = list[0].len;
        list.push(Segment {
            start: n,
            len: 9,
            parent: Some(0),
        });
        let (cut, whole) = (
            Segments::new(list).steady(),
            Segments::rows(&[n, first + 9]),
        );
        let whole = whole.steady();
        let rotary = Arc::new(Rotary::new(vec![1.0, 0.3], 2000));
        let device = burn::tensor::Device::flex();
        for (kv_heads, window) in [(2, None), (2, Some(30)), (2, Some(600)), (4, None)] {
            let shape = AttentionShape {
                kv_heads,
                ..shape(window)
            };
            let of = |segments: &Segments| {
                // In the second layout the first tokens come once more.
                let again = segments.list()[1..].iter().all(|s| s.parent.is_none());
                let rows = segments.tokens();
                let values = |width: usize, seed| {
                    let values = check::values((n + 9) * width, seed);
                    let place = |i: usize| match again && i >= n {
                        true if i - n < first => i - n,
                        true => i - first,
                        false => i,
                    };
                    let of_token = |i| values[place(i) * width..][..width].to_vec();
                    let values: Vec<f32> = (0..rows).flat_map(of_token).collect();
                    crate::tensor(values, rows, width, &device)
                };
                let [q, k, v] = [
                    values(16, 1),
                    values(4 * kv_heads, 2),
                    values(4 * kv_heads, 3),
                ];
                let segments = Arc::new(segments.clone());
                crate::values(attention(q, k, v, &segments, &rotary, shape))
            };
            let (cut, whole) = (of(&cut), of(&whole));
            let what = format!("{n} {kv_heads} {window:?}");
            assert!(
                check::bits(&cut[..n * 16]) == check::bits(&whole[..n * 16]),
                "{what}"
            );
            let (cut, whole) = (&cut[n * 16..], &whole[(n + first) * 16..]);
            assert!(
                check::bits(cut) == check::bits(whole),
                "{what}, the other row"
            );
        }
    }
}

#[test]
fn cached_steps_equal_the_whole_row() {
    let (n, rotary) = (11, rotary());
    let segments = Arc::new(Segments::rows(&[n]));
    let (q, k, v) = (
        check::values(n * 16, 1),
        check::values(n * 8, 2),
        check::values(n * 8, 3),
    );
    let device = burn::tensor::Device::flex();
    let whole = crate::values(attention(
        crate::tensor(q.clone(), n, 16, &device),
        crate::tensor(k.clone(), n, 8, &device),
        crate::tensor(v.clone(), n, 8, &device),
        &segments,
        &rotary,
        shape(Some(6)),
    ));
    let (mut q, mut k) = (q, k);
    rotary.rotate(&mut q, segments.positions());
    rotary.rotate(&mut k, segments.positions());
    for (from, to) in [(0, 4), (4, 5), (5, 11)] {
        let (q, k, v) = (&q[from * 16..to * 16], &k[..to * 8], &v[..to * 8]);
        let part = attend(q, k, v, to, shape(Some(6)));
        check::close(&part, &whole[from * 16..to * 16], 1e-5);
    }
}
