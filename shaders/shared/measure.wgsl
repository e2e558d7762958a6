// The first pass of the guard: one workgroup for each chunk.
@compute @workgroup_size(WORKGROUP)
fn measure(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = workgroup.x + workgroup.y * grid.x;
    if (index >= arrayLength(&table.chunks)) {
        return;
    }
    let chunk = table.chunks[index];
    let control = work.control;
    unseen_zero = control.zero;
    var found = 0u;
    var largest = 0u;
    for (var i = lane; 4u * i < chunk.len; i += WORKGROUP) {
        let raw = gradient_at(chunk.gradient4 + i);
        found |= found_in(raw);
        let finite = finite_part(within_bound(control.switches, control.bound, raw));
        largest = max(largest, largest_of_four(magnitude_bits(finite)));
    }
    found = any_of_lanes(lane, found);
    var partial = Partial(0.0, 0.0, -127, found);
    if ((control.switches & CLIPS_NORM) != 0u) {
        let exponent = exponent_of(largest_of_lanes(lane, largest));
        var sum = double(vec4<f32>(0.0));
        for (var i = lane; 4u * i < chunk.len; i += WORKGROUP) {
            let finite = finite_part(within_bound(control.switches, control.bound, gradient_at(chunk.gradient4 + i)));
            let x = lowered(select(vec4<f32>(0.0), finite, lanes_inside(i, chunk.len)), exponent);
            sum = add_product(sum, x, x);
        }
        let total = sum_of_lanes(lane, sum);
        partial = Partial(total.hi.x, total.lo.x, exponent, found);
    }
    if (lane == 0u) {
        partials[table.first + index] = partial;
    }
}
