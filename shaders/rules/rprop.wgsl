// Twin of src/rules/rprop.rs.

struct Scalars {
    // 1 where the step sizes do not exist yet.
    first: f32,
    // Δ₀.
    start: f32,
    // η⁻.
    shrink: f32,
    // η⁺.
    grow: f32,
    // Δmin.
    smallest: f32,
    // Δmax.
    largest: f32,
}

// The only variant.
fn rprop(
    c: Scalars,
    p: vec4<f32>,
    g: vec4<f32>,
    previous: ptr<function, vec4<f32>>,
    delta: ptr<function, vec4<f32>>,
) -> vec4<f32> {
    let zero = vec4<f32>(0.0);
    let agreement = g * *previous;
    let turned = agreement < zero;
    let lessened = select(vec4<f32>(1.0), vec4<f32>(c.shrink), turned);
    let factor = select(lessened, vec4<f32>(c.grow), agreement > zero);
    let size = factor * select(*delta, vec4<f32>(c.start), c.first == 1.0);
    let at_least = select(size, vec4<f32>(c.smallest), size < vec4<f32>(c.smallest));
    *delta = select(at_least, vec4<f32>(c.largest), at_least > vec4<f32>(c.largest));
    *previous = select(g, zero, turned);
    let down = select(zero, *delta, *previous > zero);
    return p - select(down, -*delta, *previous < zero);
}
